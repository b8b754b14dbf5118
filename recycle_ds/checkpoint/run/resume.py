"""Going on from a checkpoint, at any layout, and beginning a new run from another's weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import DataIdentity, Manifest, read_manifest
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source, assemble, check_tensors
from recycle_ds.config import ModelConfig, RunConfig
from recycle_ds.model.build import whole_shapes
from recycle_ds.model.sharding import pieces
from recycle_ds.parallel.agree import SharedError, from_rank, together
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import MachineFault
from recycle_ds.training.engine.build import TrainingEngine
from recycle_ds.training.state import TrainingState

RECYCLE = "recycle."
# What must be as it was: another model, other data, another order of the data or another batch is another run.
_FIXED = (
    "model",
    "recycle",
    "training.seed",
    "training.global_batch_size",
    "training.seq_length",
)
# What may change at a resume without a word.
_FREE = (
    "run_dir", "deepspeed", "init_from", "parallel", "data", "faults", "training.steps", "training.stop_at",
    "training.micro_batch_size", "training.log_every", "training.save_every", "training.eval_every", "training.eval_batches",
    "training.keep_checkpoints", "training.save_buffer_gib", "training.tensorboard", "training.profile", "training.dry_run",
    "model.vocab_multiple",
    "training.compile", "training.activation_checkpointing", "training.loss_chunk", "training.dtype", "training.nonfinite",
    "training.max_skipped_in_a_row",
)  # fmt: skip


def find_checkpoint(
    config: RunConfig, identity: DataIdentity, mesh: Mesh, device: torch.device
) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint of this run, if there is one; says what has changed since. Collective.

    Raises CheckpointError as `newest_whole` and `check_same_run` do.
    """

    def say(text: str) -> None:
        if mesh.is_first:
            print(text, flush=True)

    found = newest_whole(config, mesh, device, say)
    if found is not None:
        for note in check_same_run(config, identity, found[1], found[0]):
            say(note)
    return found


def begin(
    config: RunConfig, found: tuple[Path, Manifest] | None, engine: TrainingEngine, device: torch.device
) -> tuple[TrainingState, Path | None]:
    """Where a run begins: at a checkpoint that was found, else with weights from init_from, else with its initial ones.

    Returns the state, and the checkpoint. Raises CheckpointError. Collective.
    """
    text, state, source = "", TrainingState(), None
    if found is not None:
        source, manifest = found
        state = restore(engine, source, manifest, device)
        text = f"resuming from {source}"
    elif config.init_from is not None:
        weights, missing = initialise_from(engine, config.init_from, device)
        text = f"weights from {weights.folder}"
        if missing:
            text += f"; {len(missing)} tensors of the recycle module are new"
        elif weights.recycle.layers and not config.recycle.layers:
            text += "; its recycle module is left out"
        notes = list(weights.notes)
        if config.training.seq_length > weights.model.max_positions:
            notes.append(
                f"training.seq_length ({config.training.seq_length}) is beyond the {weights.model.max_positions} positions "
                "that these weights know"
            )
        text = "\n".join((text, *(f"note: {note}" for note in notes)))
    if text and engine.mesh.is_first:
        print(text, flush=True)
    return state, source


def newest_whole(config: RunConfig, mesh: Mesh, device: torch.device, say: Any) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of the run whose files all hold, or None where there is none at all.

    Damaged ones are named through `say` and passed over. Raises CheckpointError when there are some and none is whole.
    Collective: ranks share the checksums and agree.
    """
    # shared file systems may show ranks different lists: the first rank's holds
    names = from_rank(0, [folder.name for folder in completed(Path(config.run_dir))], mesh, device)
    root = Path(config.run_dir) / "checkpoints"
    for name in names:
        folder = root / name
        try:
            return folder, together(partial(_read_whole, folder, mesh), mesh, device)
        except (SharedError, MachineFault) as error:
            say(f"warning: {folder} is damaged ({error}); falling back to the one before")
    if names:
        raise CheckpointError(
            f"{root}: {len(names)} checkpoints and none is whole; restore one, or start anew in another run_dir"
        )
    return None


def _read_whole(folder: Path, mesh: Mesh) -> Manifest:
    """A checkpoint's manifest, once this rank's share of its files holds. Raises CheckpointError."""
    source = PortableSource(folder, read_manifest(folder))
    source.verify(mesh.rank, mesh.world_size)
    return source.manifest


def check_same_run(config: RunConfig, identity: DataIdentity, manifest: Manifest, folder: Path) -> list[str]:
    """Refuses, by name, a resume with another model, data, seed or batch. Returns notes on other changes.

    Data are compared by content: files may have moved. Raises CheckpointError.
    """
    if "training" not in manifest.config:
        raise CheckpointError(
            f"{folder}: holds weights only, a conversion's; give it as init_from, with another run_dir"
        )
    if identity.tokenizer != manifest.data.tokenizer:
        raise CheckpointError(
            f"{folder}: cannot go on: data.tokenizer ({config.data.tokenizer}) is another tokenizer than the run began with; "
            "put it back, or use another run_dir"
        )
    weights = [source["weight"] for source in manifest.config["data"]["train"]]
    if identity.train != manifest.data.train or weights != [source.weight for source in config.data.train]:
        raise CheckpointError(
            f"{folder}: cannot go on: the token files or weights of data.train are not those the run began with; "
            "put them back, or use another run_dir"
        )
    now, then = _flat(config.model_dump(mode="json")), _flat(manifest.config)
    notes = []
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) == then.get(key):
            continue
        change = f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        if _under(key, _FIXED) and key not in _FREE:
            raise CheckpointError(
                f"{folder}: cannot go on: {change}; put it back, or use another run_dir (init_from keeps weights)"
            )
        if not _under(key, _FREE):
            notes.append(f"note: resuming with a change: {change}")
    return notes


def restore(engine: TrainingEngine, folder: Path, manifest: Manifest, device: torch.device) -> TrainingState:
    """Loads weights, moments, Adam's step and, at the same number of ranks, the random generators. Collective."""
    mesh = engine.mesh
    same = manifest.layout.get("world_size") == mesh.world_size
    generators = folder / f"rng-{mesh.rank:05d}.safetensors"
    states = together(lambda: _read_generators(generators) if same else {}, mesh, device)
    _load_tensors(engine, PortableSource(folder, manifest), moments=True)
    engine.master.adam_step = manifest.adam_step
    if same:
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
    else:
        torch.manual_seed(int(manifest.config["training"]["seed"]) * 1_000_003 + manifest.step * 1_009 + mesh.rank)
    recent = tuple((loss, norm) for loss, norm in manifest.recent)
    return TrainingState(manifest.step, manifest.next_sample, manifest.skipped, manifest.rollbacks, recent)


def initialise_from(engine: TrainingEngine, path: str, device: torch.device) -> tuple[Source, list[str]]:
    """Loads the weights of another run, a checkpoint or a folder of another format, each rank reading only its part.

    Returns the source, and the recycle module's tensors where it has no module: they keep their initial values. Raises
    CheckpointError for any other difference in names, shapes or rotary embedding. Collective: ranks share the checksums.
    """
    mesh = engine.mesh

    def open_checked() -> Source:
        source = open_source(path, verify=False)
        fault = _differences(engine.model.config, source)
        if fault is not None:
            raise CheckpointError(fault)
        source.verify(mesh.rank, mesh.world_size)
        return source

    try:
        source = together(open_checked, mesh, device)
    except SharedError as error:
        raise CheckpointError(f"init_from={path}: {error}") from None
    return source, _load_tensors(engine, source, moments=False, optional=RECYCLE)


def _differences(config: ModelConfig, source: Source) -> str | None:
    """What names and shapes do not show: the same weights under another rotation or epsilon are another model."""
    for key in ("rope", "norm_epsilon", "heads"):
        mine, theirs = getattr(config, key), getattr(source.model, key)
        if mine != theirs:
            shown = [value.model_dump(exclude_none=True) if key == "rope" else value for value in (mine, theirs)]
            return f"model.{key} is {shown[0]} here and {shown[1]} there; set it as the weights were trained with"
    return None


def _load_tensors(engine: TrainingEngine, source: Source, *, moments: bool, optional: str | None = None) -> list[str]:
    """Returns what the source lacks and may lack. An error on one rank ends all, and none goes on with part of the weights."""
    master, model = engine.master, engine.model
    table = pieces(model, engine.mesh)

    def check() -> list[str]:
        # against the whole model: a pipeline stage knows its own part only
        lacks = check_tensors(source, whole_shapes(model.config, model.recycle_config), optional)
        if isinstance(source, PortableSource):
            source.probe({piece.name for row in table.values() for piece in row}.difference(lacks))
        return lacks

    device = next(model.parameters()).device
    missing = together(check, engine.mesh, device)
    lacking = set(missing)

    def load() -> None:
        for name in sorted(master.parameters):
            if any(piece.name in lacking for piece in table[name]):
                continue
            for kind in master.kinds(name) if moments else ("weight",):
                present = kind == "weight" or all(source.has(piece.name, kind) for piece in table[name])
                if present:  # moments are absent for what was frozen at the time
                    master.write(name, kind, assemble(source, table[name], master.shape(name), kind))

    together(load, engine.mesh, device)
    master.refresh()
    return missing


def _read_generators(path: Path) -> dict[str, Tensor]:
    """States of the random generators, looked at before a weight changes. Raises CheckpointError."""
    try:
        states = load_file(str(path))
        torch.Generator().set_state(states["cpu"])
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: no state of a random generator can be read there: {error}") from None
    return states


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, part in tree.items()
        for key, value in _flat(part, f"{prefix}.{name}" if prefix else name).items()
    }


def _under(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)
