"""Maps the parameters of each model-parallel rank to canonical tensors, for this package's names and for Hugging Face's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ds.checkpoint.deepspeed_native.autotp import Shape, Shard, split
from recycle_ds.checkpoint.deepspeed_native.files import Inventory
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import read_json
from recycle_ds.checkpoint.huggingface.families import read_model
from recycle_ds.checkpoint.huggingface.names import hugging_face_name
from recycle_ds.checkpoint.sources import shorten
from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig, RunConfig, load_config
from recycle_ds.model.build import build_model, whole_shapes
from recycle_ds.model.sharding import Piece, is_copy, pieces
from recycle_ds.parallel.layout import Coordinates, Layout
from recycle_ds.parallel.mesh import virtual_mesh, world_of_one
from recycle_ds.training.engine.optimizer import parameter_groups, part_of

RUN_CONFIG, MODEL_CONFIG = "config.yaml", "config.json"
# Number of parent folders searched. A run saves to run_dir/FOLDER/TAG, transformers to checkpoint-500/global_step500.
_ABOVE = {RUN_CONFIG: 3, MODEL_CONFIG: 2}
# Upper limit of the evaluation length if the training's sequence length is unknown: evaluating a long context is expensive.
_WINDOW = 2048


@dataclass(frozen=True)
class Described:
    """What the configuration specifies about the parameters in the files."""

    model: ModelConfig
    recycle: RecycleConfig
    seq_length: int
    tokenizer: Path | None
    """Path of the tokenizer in the configuration."""
    notes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    """Full shape of every canonical tensor."""
    shards: Mapping[str, tuple[Shard, ...]]
    """Shards of every canonical tensor, in row order."""
    expected: tuple[Mapping[str, tuple[int, ...]], ...]
    """Local shapes by parameter, for each model-parallel rank."""
    redundant: frozenset[str]
    """Parameters that may be present and duplicate another one."""
    groups: tuple[tuple[tuple[str, ...], ...], ...]
    """Parameter names by optimizer group, for each model-parallel rank; empty if they are unknown."""


def describe(inventory: Inventory, local_shapes: Sequence[Mapping[str, Shape]], config: Path | None) -> Described:
    """Detects the naming scheme and reads its configuration: `config`, or one in the folder or above it.

    local_shapes: shapes by parameter name, for each model-parallel rank.

    Raises CheckpointError for names of neither scheme, and for a missing or invalid configuration.
    """
    names = set().union(*local_shapes)
    if any(name.startswith(("blocks.", "embedding.")) for name in names):
        return _describe_own(inventory, config or _search(inventory.folder, RUN_CONFIG))
    if any(name.startswith("model.layers.") for name in names):
        return _describe_hugging_face(inventory, local_shapes, config or _search(inventory.folder, MODEL_CONFIG))
    raise CheckpointError(
        f"{inventory.folder}: parameter names match neither this package nor Hugging Face's LLaMA family: "
        f"{shorten(sorted(names)) or 'no parameters'}"
    )


def _search(folder: Path, name: str) -> Path:
    above = Path(os.path.abspath(folder))
    candidates = [above, *above.parents][: 1 + _ABOVE[name]]
    for candidate in candidates:
        if (candidate / name).is_file():
            return candidate / name
    kind = "a run's" if name == RUN_CONFIG else "the model's"
    raise CheckpointError(
        f"{folder}: DeepSpeed's files do not describe the model, and there is no {name} in this folder or the {_ABOVE[name]} "
        f"above it: give {kind} {name} with --config FILE"
    )


def _describe_own(inventory: Inventory, path: Path) -> Described:
    try:
        config = load_config(path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'--config {path}: ')}") from None
    if config.model.vocab_size is None:
        raise CheckpointError(
            f"{path}: model.vocab_size is not set: give the config.yaml that the run wrote to its run_dir, or set it here"
        )
    layout = Layout(inventory.tensor, inventory.pipeline)
    shards: dict[str, list[Shard]] = {}
    expected, groups = [], []
    with world_of_one():
        for rank in range(layout.world_size):
            table, own, grouped = _describe_rank(config, layout, rank)
            expected.append(own)
            groups.append(grouped)
            for name, row in table.items():
                for piece in row:
                    shards.setdefault(piece.name, []).append(Shard(rank, name, piece))
    tokenizer = Path(config.data.tokenizer)
    return Described(
        config.model,
        config.recycle,
        config.training.seq_length,
        tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer,
        (),
        whole_shapes(config.model, config.recycle),
        {name: tuple(sorted(row, key=lambda shard: shard.piece.start)) for name, row in shards.items()},
        tuple(expected),
        frozenset(),
        tuple(groups),
    )


def _describe_rank(
    config: RunConfig, layout: Layout, rank: int
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, tuple[int, ...]], tuple[tuple[str, ...], ...]]:
    """Returns, for one model-parallel rank: the pieces that only it holds, all local shapes, and the optimizer groups."""
    pipeline, tensor = divmod(rank, layout.tensor)
    mesh = virtual_mesh(layout, layout.rank_of(Coordinates(pipeline, 0, 0, tensor)))
    try:
        with torch.device("meta"):
            model = build_model(config.model, config.recycle, mesh, seed=None, seq_length=config.training.seq_length)
    except ConfigError as error:
        raise CheckpointError(f"{layout.pipeline} pipeline stages do not match the configuration: {error}") from None
    table = {
        name: tuple(piece for piece in row if tensor == 0 or not piece.whole)
        for name, row in pieces(model, mesh).items()
        if not is_copy(name, mesh)
    }
    if config.recycle.gradient == "frozen_backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) == "recycle")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = tuple(tuple(names[member] for member in group["params"]) for group in parameter_groups(model, 0.0))
    return table, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, groups


def _describe_hugging_face(inventory: Inventory, local_shapes: Sequence[Mapping[str, Shape]], path: Path) -> Described:
    model, notes = read_model(read_json(path), str(path))
    recycle = RecycleConfig(layers=0)
    shapes = whole_shapes(model, recycle)
    expected: list[dict[str, Shape]] = [{} for _ in local_shapes]
    shards: dict[str, tuple[Shard, ...]] = {}
    for name, shape in shapes.items():
        parameter = hugging_face_name(name)
        shards[name], local = split(name, shape, [own.get(parameter) for own in local_shapes])
        for own, part in zip(expected, local, strict=True):
            own[parameter] = part
    if inventory.model_parallel > 1 and (inventory.pipeline > 1 or all(len(row) == 1 for row in shards.values())):
        raise CheckpointError(
            f"{inventory.folder}: tensor ranks ({inventory.tensor}) x stages ({inventory.pipeline}) of a Hugging Face model: "
            "stages are not supported, and tensor ranks only if DeepSpeed AutoTP split the linear layers over them"
        )
    return Described(
        model,
        recycle,
        min(_WINDOW, model.max_positions),
        None,
        tuple(notes),
        shapes,
        shards,
        tuple(expected),
        frozenset({"lm_head.weight"} if model.tied_embeddings else ()),
        ((),) * len(local_shapes),
    )
