"""Writing a checkpoint: every rank writes its share to a temporary folder, which is renamed once it is complete on disk.

Parameters are gathered one at a time, and the replicas take turns in keeping them, so a rank buffers at most its own share, in
host memory, from where a thread writes it while training continues. On CUDA training does not wait for the copies either, see
`HostCopies`. Once the threads of all ranks have finished, the ranks agree on the result, and rank 0 publishes the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recycle_ds.checkpoint.files.checksums import describe
from recycle_ds.checkpoint.files.tokenizer_files import TOKENIZER, copy_tokenizer
from recycle_ds.checkpoint.portable.folders import REPLACED, completed, step_folder, step_of
from recycle_ds.checkpoint.portable.manifest import DataIdentity, write_manifest
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.checkpoint.run.host_copies import HostCopies
from recycle_ds.checkpoint.run.resume import newest_of_run, restore
from recycle_ds.checkpoint.run.shard_writer import ShardWriter, disk_error
from recycle_ds.config.atomic_files import TEMPORARY, fsync, write_atomically
from recycle_ds.data.token_ranking import RANKING, write_ranking
from recycle_ds.model.sharding import Piece, is_copy, pieces
from recycle_ds.parallel.agree import broadcast_from
from recycle_ds.parallel.peers import TakenOver
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.engine.master_state import owning_replica
from recycle_ds.training.state import TrainingState


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written, with the training state of the moment it was started."""

    state: TrainingState
    adam_step: int
    temporary: Path
    final: Path
    writer: ShardWriter


class PortableCheckpointer:
    """Saves a run's engine under run_dir/checkpoints. See `Checkpointer` in recycle_ds.training.state.

    Before rank 0 changes the run folder, it asks whether a later start has taken it over; then `begin` and `finish` raise
    TakenOver on all ranks. ranking: the tokens by frequency, on rank 0, for a run with a draft vocabulary. Construction is
    collective.
    """

    def __init__(self, engine: TrainingEngine, identity: DataIdentity, ranking: list[int] | None = None) -> None:
        self._context, self._engine, self._identity, self._ranking = engine.context, engine, identity, ranking
        self._config = self._context.config
        # two starts never share a temporary folder, even if the earlier one has not noticed the takeover yet
        self._token = broadcast_from(0, secrets.token_hex(4), engine.mesh)
        self._run_dir = Path(self._config.run_dir)
        self._save: _Save | None = None
        copies = HostCopies(engine.mesh.device, live=engine.zero.reads_are_live)
        copies.prepare(self._bytes_to_copy())
        # nothing but the optimizer's step changes what is saved while a checkpoint is written: `restore` waits for `finish`
        engine.optimizer.register_step_pre_hook(lambda *_: copies.before_update())
        self._copies = copies

    def begin(self, state: TrainingState) -> bool:
        """See `Checkpointer`. Buffers up to training.save_buffer_gib in host memory ahead of the disk."""
        assert self._save is None, "one checkpoint is written at a time"
        final = step_folder(self._run_dir, state.step)
        temporary = final.with_name(f"{TEMPORARY}{final.name}-{self._token}")
        mesh = self._engine.mesh
        if not self._on_first_rank(lambda: _make_empty(temporary)):
            return False
        self._copies.end_preparation()
        writer = ShardWriter(temporary, mesh.rank, self._buffer, self._copies)
        self._gather(writer)
        generators = {"cpu": torch.get_rng_state()}
        if mesh.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(mesh.device)
        writer.close(generators)
        self._save = _Save(state, self._engine.zero.adam_step, temporary, final, writer)
        return True

    def ended(self) -> bool:
        """See `Checkpointer`."""
        return self._save is None or self._save.writer.ended

    def finish(self) -> Path | None:
        """See `Checkpointer`. Writes the manifest, then `latest`; if the disk fails, the older checkpoints stay."""
        assert self._save is not None, "begin must be called first"
        save, self._save = self._save, None
        published = False
        try:
            if self._all_succeeded(save.writer.wait()):
                published = self._on_first_rank(lambda: self._publish(save))
            else:  # a takeover may look like a disk error: checked here
                self._on_first_rank(lambda: None)
        finally:
            if not published:
                self._discard(save.temporary)
        return save.final if published else None

    def restore(self) -> tuple[TrainingState, Path] | None:
        """See `Checkpointer`. Raises CheckpointError if there are checkpoints and all are damaged."""
        assert self._save is None, "finish must be called first"
        found = newest_of_run(self._context, self._report)
        if found is None:
            return None
        folder, manifest = found
        return restore(self._engine, folder, manifest), folder

    def _report(self, text: str) -> None:
        if self._engine.mesh.is_first:
            print(text, flush=True)

    @property
    def _buffer(self) -> int:
        return int(self._config.training.save_buffer_gib * 2**30)

    def _shares(self) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        """All local parameters in the order in which they are gathered, and the pieces of each that this rank saves.

        Gathering is collective: every rank goes through all of them."""
        mesh, master = self._engine.mesh, self._engine.master
        table = pieces(self._engine.model, mesh)
        for name, rank in owning_replica(list(master.parameters), mesh.replicas.size).items():
            is_owner = rank == mesh.replicas.rank and not is_copy(name, mesh)
            own = table[name] if is_owner else ()
            yield name, tuple(piece for piece in own if mesh.tensor.rank == 0 or not piece.whole)

    def _gather(self, writer: ShardWriter) -> None:
        """Gathers every parameter and hands this rank's share to the writer. Collective."""
        master = self._engine.master
        for name, own in self._shares():
            for kind in master.kinds(name):
                value = master.read(name, kind)
                for piece in own:
                    writer.add(piece, kind, value)

    def _bytes_to_copy(self) -> int:
        """Bytes that this rank copies from its device for a checkpoint, as many as are buffered."""
        master, found = self._engine.master, 0
        if all(tensor.device.type == "cpu" for tensor in self._engine.zero.masters()):  # offloaded
            return 0
        for name, own in self._shares():
            shape, kinds = master.shape(name), master.kinds(name)
            if len(kinds) > 1:  # frozen weights may be on the host
                found += sum(4 * math.prod(shape) // shape[piece.axis] * piece.length * len(kinds) for piece in own)
        return min(found, self._buffer)

    def _publish(self, save: _Save) -> None:
        """Rank 0: merges the ranks' parts into the manifest, renames the folder, updates `latest`, deletes old checkpoints."""
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
        names = copy_tokenizer(tokenizer, temporary)
        if self._ranking is not None:
            write_ranking(temporary, self._ranking)
            names.append(RANKING)
        files |= {name: describe(temporary / name).model_dump() for name in dict.fromkeys(names)}
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
        replaced = None
        if final.exists():  # an older checkpoint of the same step: deleted once this one is in place
            replaced = final.with_name(f"{REPLACED}{final.name}")
            os.rename(final, replaced)
        os.rename(temporary, final)
        fsync(final.parent)
        if self._context.taken_by() is not None:  # in the meantime: do not overwrite the later start's `latest`
            return
        try:  # the checkpoint is published: errors from here on are reported and do not undo it
            write_atomically(final.parent / "latest", f"{final.name}\n")
            # newer ones can only be damaged ones that the run fell back from: not counted
            older = [path for path in completed(self._run_dir) if (step_of(path) or 0) <= state.step]
            for old in [*([replaced] if replaced else []), *older[self._config.training.keep_checkpoints :]]:
                # renamed first: after a kill, a half-deleted folder must not be taken for a checkpoint
                to_delete = old.with_name(f"{TEMPORARY}old-{old.name}")
                os.rename(old, to_delete)
                shutil.rmtree(to_delete)
        except OSError as error:
            print(f"warning: {final} is saved, but updating `latest` or deleting old ones failed: {error}", flush=True)

    def _on_first_rank(self, action: Callable[[], None]) -> bool:
        """Runs `action`, which changes the run folder, on rank 0. Returns whether the disk accepted it. Raises TakenOver if a
        later start has taken over the folder. Collective."""
        error, new_owner = None, None
        if self._engine.mesh.is_first:
            new_owner = self._context.taken_by()
            if new_owner is None:
                error = disk_error(action)
                # a disk error may come from a takeover, in which the later start deletes unfinished folders
                new_owner = self._context.taken_by() if error is not None else None
        new_owner = broadcast_from(0, new_owner, self._engine.mesh)
        if new_owner is not None:
            raise TakenOver(self._config.run_dir, new_owner)
        return self._all_succeeded(error)

    def _all_succeeded(self, error: str | None) -> bool:
        """Whether no rank has an error; each rank prints its own. Collective."""
        if error is not None:
            print(f"warning: rank {self._engine.mesh.rank}: saving failed: {error}", flush=True)
        failures = torch.tensor([error is not None], dtype=torch.int32, device=self._engine.mesh.device)
        if self._engine.mesh.world_size > 1:
            dist.all_reduce(failures)
        return int(failures.item()) == 0

    def _discard(self, temporary: Path) -> None:
        if self._engine.mesh.is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
