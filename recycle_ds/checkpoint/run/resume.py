"""Resuming a run from a checkpoint, at any layout, and starting a new run from the weights of another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import DataIdentity, Manifest, read_manifest
from recycle_ds.checkpoint.portable.newest import newest_intact
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.run.same_run import check_same_run
from recycle_ds.checkpoint.sources import Source, assemble, check_tensors
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model.build import whole_shapes
from recycle_ds.model.sharding import pieces
from recycle_ds.parallel.agree import SharedError, broadcast_from, on_all_ranks
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import MachineFault
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.run_context import RunContext
from recycle_ds.training.state import TrainingState

RECYCLE = "recycle."
# Parts of the module that a trained one can be given. Their initial values do not change its output.
_EXTENSIONS = ("recycle.tap_", "recycle.confidence.")


def checkpoint_to_resume(context: RunContext, identity: DataIdentity) -> tuple[Path, Manifest] | None:
    """The newest intact checkpoint of this run, or None if there is none. Prints the settings that have changed. Collective.

    Raises CheckpointError as `newest_of_run` and `check_same_run` do.
    """

    def report(text: str) -> None:
        if context.mesh.is_first:
            print(text, flush=True)

    found = newest_of_run(context, report)
    if found is not None:
        for note in check_same_run(context.config, identity, found[1], found[0]):
            report(note)
    return found


def begin(engine: TrainingEngine, found: tuple[Path, Manifest] | None) -> tuple[TrainingState, Path | None]:
    """Loads the checkpoint `found`, or else the weights of init_from; without either, the engine keeps its initial weights.

    Returns the training state, and the checkpoint if there is one. Raises CheckpointError. Collective.
    """
    config, text, state, source = engine.context.config, "", TrainingState(), None
    if found is not None:
        source, manifest = found
        state = restore(engine, source, manifest)
        text = f"resuming from {source}"
    elif config.init_from is not None:
        weights, missing = initialise_from(engine, config.init_from)
        text = f"weights from {weights.folder}"
        if missing:
            text += f"; {len(missing)} tensors of the recycle module are newly initialised"
        elif weights.recycle.layers and not config.recycle.layers:
            text += "; its recycle module is not used"
        notes = list(weights.notes)
        if config.training.seq_length > weights.model.max_positions:
            notes.append(
                f"training.seq_length ({config.training.seq_length}) exceeds the max_positions of these weights "
                f"({weights.model.max_positions})"
            )
        if config.model.max_positions != weights.model.max_positions:
            notes.append(
                f"model.max_positions is {config.model.max_positions}, but {weights.model.max_positions} in the weights: "
                "the former will be the longest context of the trained model"
            )
        text = "\n".join((text, *(f"note: {note}" for note in notes)))
    if text and engine.mesh.is_first:
        print(text, flush=True)
    return state, source


def newest_of_run(context: RunContext, warn: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of the run with intact files, or None if the run has no checkpoint.

    Damaged ones are reported through `warn` and skipped. Raises CheckpointError if there are checkpoints and all are damaged.
    Collective: each rank verifies its share of the files, and all agree on the result.
    """
    mesh, run_dir = context.mesh, Path(context.config.run_dir)
    # on shared file systems ranks may see different lists: all use rank 0's
    names = broadcast_from(0, [folder.name for folder in completed(run_dir)], mesh)
    folders = [run_dir / "checkpoints" / name for name in names]

    def open_folder(folder: Path) -> Manifest:
        return on_all_ranks(partial(_read_verified, folder, mesh), mesh)

    return newest_intact(folders, open_folder, warn, (SharedError, MachineFault))


def _read_verified(folder: Path, mesh: Mesh) -> Manifest:
    """Verifies this rank's share of a checkpoint's files and returns its manifest. Raises CheckpointError."""
    source = PortableSource(folder, read_manifest(folder))
    source.verify(mesh.rank, mesh.world_size)
    return source.manifest


def restore(engine: TrainingEngine, folder: Path, manifest: Manifest) -> TrainingState:
    """Loads weights, moments, Adam's step and, at the same world size, the random generators. Collective."""
    mesh = engine.mesh
    same_world_size = manifest.layout.get("world_size") == mesh.world_size
    generators = folder / f"rng-{mesh.rank:05d}.safetensors"
    states = on_all_ranks(lambda: _read_generators(generators) if same_world_size else {}, mesh)
    _load_tensors(engine, PortableSource(folder, manifest), moments=True)
    engine.zero.adam_step = manifest.adam_step
    if same_world_size:
        torch.set_rng_state(states["cpu"])
        if mesh.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], mesh.device)
    else:
        torch.manual_seed(int(manifest.config["training"]["seed"]) * 1_000_003 + manifest.step * 1_009 + mesh.rank)
    recent = tuple((loss, norm) for loss, norm in manifest.recent)
    return TrainingState(manifest.step, manifest.next_sample, manifest.skipped, manifest.rollbacks, recent)


def initialise_from(engine: TrainingEngine, path: str) -> tuple[Source, list[str]]:
    """Loads the weights of a run, a checkpoint or a folder in another format; each rank reads only its part.

    Returns the source, and the names of the recycle module's tensors that keep their initial values: all of them if the source
    has no module, and those of a part that its module has not. Raises CheckpointError for any other difference in names, shapes
    or rotary embedding. Collective: each rank verifies its share of the files.
    """
    mesh = engine.mesh

    def open_checked() -> Source:
        source = open_source(path, verify=False)
        mismatch = _setting_mismatch(engine.model.config, engine.model.recycle_config, source)
        if mismatch is not None:
            raise CheckpointError(mismatch)
        source.verify(mesh.rank, mesh.world_size)
        return source

    try:
        source = on_all_ranks(open_checked, mesh)
    except SharedError as error:
        raise CheckpointError(f"init_from={path}: {error}") from None
    return source, _load_tensors(engine, source, moments=False, optional=(RECYCLE, *_EXTENSIONS))


def _setting_mismatch(config: ModelConfig, recycle: RecycleConfig, source: Source) -> str | None:
    """A difference that names and shapes do not show, or None: with another RoPE or epsilon the weights are another model's."""
    for key in ("rope", "norm_epsilon", "heads"):
        configured, stored = getattr(config, key), getattr(source.model, key)
        if configured != stored:
            shown = [value.model_dump(exclude_none=True) if key == "rope" else value for value in (configured, stored)]
            return (
                f"model.{key} is {shown[0]} here and {shown[1]} in the source; set it as in the training of the weights"
            )
    taps = source.recycle.taps
    if recycle.layers and taps and taps != recycle.taps:
        return (
            f"recycle.taps is {list(recycle.taps)} here and {list(taps)} in the source; set recycle.taps={list(taps)}"
        )
    return None


def _load_tensors(
    engine: TrainingEngine, source: Source, *, moments: bool, optional: tuple[str, ...] = ()
) -> list[str]:
    """Returns the names of optional tensors that the source does not have. An error on one rank is raised on all of them, so
    that none continues with part of the weights."""
    master, model = engine.master, engine.model
    table = pieces(model, engine.mesh)

    def check() -> list[str]:
        # compared with the whole model: this rank's pipeline stage is only a part of it
        absent = check_tensors(source, whole_shapes(model.config, model.recycle_config), optional)
        if isinstance(source, PortableSource):
            source.probe({piece.name for row in table.values() for piece in row}.difference(absent))
        return absent

    missing = on_all_ranks(check, engine.mesh)
    skipped = set(missing)

    def load() -> None:
        for name in sorted(master.parameters):
            if any(piece.name in skipped for piece in table[name]):
                continue
            for kind in master.kinds(name) if moments else ("weight",):
                present = kind == "weight" or all(source.has(piece.name, kind) for piece in table[name])
                if present:  # parameters that were frozen have no moments
                    master.write(name, kind, assemble(source, table[name], master.shape(name), kind))

    on_all_ranks(load, engine.mesh)
    master.refresh()
    return missing


def _read_generators(path: Path) -> dict[str, Tensor]:
    """States of the random generators, validated before a weight changes. Raises CheckpointError."""
    try:
        states = load_file(str(path))
        torch.Generator().set_state(states["cpu"])
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot read the states of the random generators: {error}") from None
    return states
