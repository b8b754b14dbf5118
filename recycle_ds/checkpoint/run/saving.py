"""Writing a checkpoint: every rank its share, to a temporary folder that is renamed once all of it is on disk.

Parameters are gathered one at a time, and of each the replicas take turns to keep it, so a rank holds its own share at most: in
host memory, from where a thread writes it while training goes on. Once all ranks' threads have ended, the ranks agree, and the
first one publishes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recycle_ds.checkpoint.files.checksums import describe, write_text
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, copy_tokenizer
from recycle_ds.checkpoint.portable.folders import REPLACED, completed, step_folder, step_of
from recycle_ds.checkpoint.portable.manifest import DataIdentity, write_manifest
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.checkpoint.run.resume import newest_whole, restore
from recycle_ds.checkpoint.run.shard_writer import ShardWriter, disk_fault
from recycle_ds.config import RunConfig
from recycle_ds.config.atomic_files import flush as fsync
from recycle_ds.model.sharding import is_copy, pieces
from recycle_ds.parallel.agree import from_rank
from recycle_ds.parallel.peers import TakenOver
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.engine.master_state import keeper
from recycle_ds.training.state import TrainingState


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written, and what training has moved on from since."""

    state: TrainingState
    adam_step: int
    temporary: Path
    final: Path
    writer: ShardWriter


class PortableCheckpointer:
    """Saves a run's engine under run_dir/checkpoints. See `Checkpointer` in recycle_ds.training.state.

    taken_by: who has taken the run folder over, asked by the first rank before it touches the folder; None for nobody. `begin`
    and `finish` raise TakenOver on all ranks then. Construction is collective.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: TrainingEngine,
        device: torch.device,
        identity: DataIdentity,
        taken_by: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._config, self._engine, self._device = config, engine, device
        self._identity, self._taken_by = identity, taken_by
        # two starts never write to the same temporary folder, even if the earlier does not know yet that it has been replaced
        self._token = from_rank(0, secrets.token_hex(4), engine.mesh, device)
        self._run_dir = Path(config.run_dir)
        self._save: _Save | None = None

    def begin(self, state: TrainingState) -> bool:
        """See `Checkpointer`. Copies to the host up to training.save_buffer_gib ahead of the disk."""
        assert self._save is None, "one checkpoint is written at a time"
        final = step_folder(self._run_dir, state.step)
        temporary = final.with_name(f".tmp-{final.name}-{self._token}")
        mesh = self._engine.mesh
        if not self._first(lambda: _fresh(temporary)):
            return False
        writer = ShardWriter(temporary, mesh.rank, int(self._config.training.save_buffer_gib * 2**30))
        self._gather(writer)
        generators = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self._device)
        writer.close(generators)
        self._save = _Save(state, self._engine.master.adam_step, temporary, final, writer)
        return True

    def ended(self) -> bool:
        """See `Checkpointer`."""
        return self._save is None or self._save.writer.ended

    def finish(self) -> Path | None:
        """See `Checkpointer`. Writes the manifest, then `latest`; what was there before stays if the disk refuses."""
        assert self._save is not None, "begin comes first"
        save, self._save = self._save, None
        published = False
        try:
            if self._agree(save.writer.wait()):
                published = self._first(lambda: self._publish(save))
            else:  # a later start that tidies up looks like a fault of the disk
                self._first(lambda: None)
        finally:
            if not published:
                self._discard(save.temporary)
        return save.final if published else None

    def restore(self) -> tuple[TrainingState, Path] | None:
        """See `Checkpointer`. Raises CheckpointError when there are checkpoints and none is whole."""
        assert self._save is None, "finish comes first"
        found = newest_whole(self._config, self._engine.mesh, self._device, self._say)
        if found is None:
            return None
        folder, manifest = found
        return restore(self._engine, folder, manifest, self._device), folder

    def _say(self, text: str) -> None:
        if self._engine.mesh.is_first:
            print(text, flush=True)

    def _gather(self, writer: ShardWriter) -> None:
        """Gathers every parameter, which all ranks take part in, and keeps this rank's share."""
        mesh, master = self._engine.mesh, self._engine.master
        table = pieces(self._engine.model, mesh)
        for name, rank in keeper(list(master.parameters), mesh.replicas.size).items():
            mine = rank == mesh.replicas.rank and not is_copy(name, mesh)
            for kind in master.kinds(name):
                value = master.read(name, kind)
                for piece in table[name] if mine else ():
                    if mesh.tensor.rank == 0 or not piece.whole:
                        writer.add(piece, kind, value)

    def _publish(self, save: _Save) -> None:
        """Rank 0: merges the parts into the manifest, renames the folder, moves `latest`, forgets the oldest."""
        mesh, state, temporary, final = self._engine.mesh, save.state, save.temporary, save.final
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
        tokenizer = tokenizer / TOKENIZER if tokenizer.is_dir() else tokenizer
        files |= {name: describe(temporary / name).model_dump() for name in copy_tokenizer(tokenizer, temporary)}
        manifest = {
            "step": state.step,
            "next_sample": state.next_sample,
            "skipped": state.skipped,
            "rollbacks": state.rollbacks,
            "recent": [list(pair) for pair in state.recent],
            "adam_step": save.adam_step,
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
        write_manifest(temporary, manifest)
        fsync(temporary)
        aside = None
        if final.exists():  # the same step once more: the older one goes when this one stands in its place
            aside = final.with_name(f"{REPLACED}{final.name}")
            os.rename(final, aside)
        os.rename(temporary, final)
        fsync(final.parent)
        if self._taken_by() is not None:  # since it was asked last: another start's `latest` is newer
            return
        try:  # the checkpoint stands: what goes wrong from here on is told, and does not undo it
            write_text(final.parent / "latest", f"{final.name}\n")
            # newer ones can only be damaged ones that the run fell back from: they do not count
            older = [path for path in completed(self._run_dir) if (step_of(path) or 0) <= state.step]
            for old in [*([aside] if aside else []), *older[self._config.training.keep_checkpoints :]]:
                # under its own name, half of it would be taken for a checkpoint if this is cut short
                doomed = old.with_name(f".tmp-old-{old.name}")
                os.rename(old, doomed)
                shutil.rmtree(doomed)
        except OSError as error:
            print(f"warning: {final} is saved, but tidying up failed: {error}", flush=True)

    def _first(self, action: Callable[[], None]) -> bool:
        """Has the first rank change the run folder, if that is still ours. Whether the disk let it; TakenOver if it is not."""
        fault, taker = None, None
        if self._engine.mesh.is_first:
            taker = self._taken_by()
            if taker is None:
                fault = disk_fault(action)
                taker = self._taken_by() if fault is not None else None  # files vanish when another start tidies up
        taker = from_rank(0, taker, self._engine.mesh, self._device)
        if taker is not None:
            raise TakenOver(self._config.run_dir, taker)
        return self._agree(fault)

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
