"""Writing a checkpoint: every rank its share, to a temporary folder that is renamed once all of it is on disk.

A rank holds at most its own partition in host memory: parameters are gathered one at a time, and of each the data ranks take
turns to keep it. Shards are flushed at one GiB.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.checkpoint.files import describe, save_shard, write_json, write_text
from recycle_ds.checkpoint.folders import completed, step_folder, step_of
from recycle_ds.checkpoint.manifest import FORMAT, MANIFEST, VERSION, DataIdentity, FileEntry
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.config import RunConfig
from recycle_ds.data.atomic import flush as fsync
from recycle_ds.model.sharding import Piece, is_copy, pieces
from recycle_ds.training.engine import TrainingEngine
from recycle_ds.training.master import keeper
from recycle_ds.training.state import TrainingState

SHARD_BYTES = 2**30


class _ShardWriter:
    """Collects tensors and writes them in files of about SHARD_BYTES, remembering where each went."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self.slices: list[dict[str, Any]] = []
        self.files: dict[str, FileEntry] = {}

    def add(self, piece: Piece, kind: str, value: Tensor) -> None:
        part = value.narrow(piece.axis, piece.local_start, piece.length)
        key = f"{piece.name}/{kind}/{piece.start}"
        self._pending[key] = part.detach().to("cpu", copy=True).contiguous()
        self._bytes += part.numel() * part.element_size()
        where = {"kind": kind, "file": self._name(), "key": key, "axis": piece.axis, "start": piece.start}
        self.slices.append({"name": piece.name, "shape": list(piece.shape), **where, "length": piece.length})
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self.write(self._name(), self._pending)
            self._pending, self._bytes = {}, 0

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self._folder / name
        save_shard(path, tensors)
        self.files[name] = describe(path)

    def _name(self) -> str:
        return f"shard-{self._rank:05d}-{sum(name.startswith('shard') for name in self.files):03d}.safetensors"


class PortableCheckpointer:
    """Saves a run's engine under run_dir/checkpoints. See `Checkpointer` in recycle_ds.training.state."""

    def __init__(self, config: RunConfig, engine: TrainingEngine, device: torch.device, identity: DataIdentity) -> None:
        self._config, self._engine, self._device = config, engine, device
        self._identity = identity
        self._run_dir = Path(config.run_dir)

    def save(self, state: TrainingState) -> Path | None:
        """Writes checkpoints/step-N and then `latest`; on an error of the disk leaves what was there and returns None."""
        final = step_folder(self._run_dir, state.step)
        temporary = final.with_name(f".tmp-{final.name}")
        mesh = self._engine.mesh
        fault = self._guard(lambda: _fresh(temporary)) if mesh.is_first else None
        if not self._agree(fault):
            return None
        writer = _ShardWriter(temporary, mesh.rank)
        fault = self._write_share(writer)
        if not self._agree(fault):
            self._discard(temporary)
            return None
        fault = self._guard(lambda: self._publish(state, temporary, final)) if mesh.is_first else None
        if not self._agree(fault):
            self._discard(temporary)
            return None
        return final

    def _write_share(self, writer: _ShardWriter) -> str | None:
        """Gathers every parameter (all ranks take part even after a local fault) and writes this rank's share."""
        mesh, master = self._engine.mesh, self._engine.master
        table = pieces(self._engine.model, mesh)
        fault: str | None = None
        for name, rank in keeper(list(master.parameters), mesh.replicas.size).items():
            mine = rank == mesh.replicas.rank and not is_copy(name, mesh)
            for kind in master.kinds(name):
                value = master.read(name, kind)
                for piece in table[name] if mine and fault is None else ():
                    if mesh.tensor.rank == 0 or not piece.whole:
                        fault = self._guard(lambda p=piece, k=kind, v=value: writer.add(p, k, v))
                        if fault:
                            break
        return fault or self._guard(lambda: self._finish_share(writer))

    def _finish_share(self, writer: _ShardWriter) -> None:
        rank = self._engine.mesh.rank
        writer.flush()
        generators = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self._device)
        writer.write(f"rng-{rank:05d}.safetensors", generators)
        files = {name: entry.model_dump() for name, entry in writer.files.items()}
        write_json(writer._folder / f"part-{rank:05d}.json", {"slices": writer.slices, "files": files})

    def _publish(self, state: TrainingState, temporary: Path, final: Path) -> None:
        """Rank 0: merges the parts into the manifest, renames the folder, moves `latest`, forgets the oldest."""
        mesh = self._engine.mesh
        tensors: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for rank in range(mesh.world_size):
            part = temporary / f"part-{rank:05d}.json"
            tree = json.loads(part.read_text(encoding="utf-8"))
            files.update(tree["files"])
            for piece in tree["slices"]:
                entry = tensors.setdefault(piece.pop("name"), {"shape": piece.pop("shape"), "slices": []})
                piece.pop("shape", None)
                entry["slices"].append(piece)
            part.unlink()
        tokenizer = Path(self._config.data.tokenizer)
        tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
            fsync(temporary / "tokenizer.json")
            files["tokenizer.json"] = describe(temporary / "tokenizer.json").model_dump()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": state.step,
            "next_sample": state.next_sample,
            "skipped": state.skipped,
            "adam_step": self._engine.master.adam_step,
            "config": self._config.model_dump(mode="json"),
            "data": self._identity.model_dump(),
            "layout": {
                "world_size": mesh.world_size,
                "tensor": mesh.tensor.size,
                "pipeline": mesh.pipeline.size,
                "ulysses": mesh.ulysses.size,
                "data": mesh.data.size,
                "zero_stage": self._engine.zero_stage,
            },
            "provenance": provenance(),
            "tensors": {name: tensors[name] for name in sorted(tensors)},
            "files": files,
        }
        write_json(temporary / MANIFEST, manifest)
        fsync(temporary)
        if final.exists():  # the same step once more: the older one goes only now that this one is whole
            shutil.rmtree(final)
        os.rename(temporary, final)
        try:  # the checkpoint stands: what goes wrong from here on is told, and does not undo it
            write_text(final.parent / "latest", f"{final.name}\n")
            # newer ones can only be damaged ones that the run fell back from: they do not count
            older = [path for path in completed(self._run_dir) if (step_of(path) or 0) <= state.step]
            for old in older[self._config.training.keep_checkpoints :]:
                shutil.rmtree(old)
        except OSError as error:
            print(f"warning: {final} is saved, but tidying up failed: {error}", flush=True)

    def _guard(self, action: Any) -> str | None:
        """Runs what touches the disk; the fault, where there is one, is told to the other ranks instead of raised."""
        try:
            action()
        except OSError as error:
            return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
        except Exception as error:
            if type(error).__name__ == "SafetensorError":  # safetensors wraps the disk's errors in its own
                return str(error)
            raise
        return None

    def _agree(self, fault: str | None) -> bool:
        """Whether no rank has a fault; each prints its own."""
        if fault is not None:
            print(f"warning: rank {self._engine.mesh.rank}: saving failed: {fault}", flush=True)
        votes = torch.tensor([fault is not None], dtype=torch.int32, device=self._device)
        if self._engine.mesh.world_size > 1:
            dist.all_reduce(votes)
        return int(votes.item()) == 0

    def _discard(self, temporary: Path) -> None:
        if self._engine.mesh.is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
