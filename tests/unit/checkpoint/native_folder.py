"""Writes DeepSpeed's native folders in one process, with the keys, classes and partitions of engine.save_checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.config import RunConfig
from recycle_ds.model import build_model
from tests.runs import tiny_run

STATE = "optimizer_state_dict"


def write_folder(
    folder: Path, weights: dict[str, Tensor], *, stage: int = 2, ranks: int = 3, align: int = 1, step: int = 5
) -> Path:
    """Writes `folder`/global_stepN and `latest` for ZeRO 1 to 3; returns the tag's folder.

    Matrices and vectors form one group each. align: multiple of elements that ZeRO 1 and 2 pad parameters to. The
    moments are the weights times 2 and 3.
    """
    tag = folder / f"global_step{step}"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    groups = [
        {name: value for name, value in weights.items() if (value.dim() > 1) == matrices} for matrices in (True, False)
    ]
    for rank in range(ranks if stage == 3 else 1):
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        torch.save(_model_states(weights, groups, stage, ranks, step), tag / f"{prefix}mp_rank_00_model_states.pt")
    for rank in range(ranks):
        states = _each(groups, ranks, rank) if stage == 3 else _grouped(groups, ranks, rank, align)
        states["zero_stage"] = _stage(stage)
        states["loss_scaler"] = _scaler()
        torch.save({STATE: states, "ds_version": "0.19.8"}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tag


def change(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    """Replaces the value at `keys` in a file; `...` deletes it."""
    tree = torch.load(path, weights_only=False)  # of a folder that the test has written itself
    parent = tree
    for key in keys[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value
    torch.save(tree, path)


def _model_states(
    weights: dict[str, Tensor], groups: list[dict[str, Tensor]], stage: int, ranks: int, step: int
) -> dict[str, Any]:
    module = {name: torch.empty(0) if stage == 3 else value.bfloat16() for name, value in weights.items()}
    return {
        "module": OrderedDict(module),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, value.shape) for name, value in group.items()) for group in groups],
        "frozen_param_shapes": OrderedDict() if stage > 1 else None,
        "frozen_param_fragments": OrderedDict() if stage > 1 else None,
        "shared_params": {},
        "global_steps": step,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_version": "0.19.8",
    }


def _grouped(groups: list[dict[str, Tensor]], ranks: int, rank: int, align: int) -> dict[str, Any]:
    """ZeRO 1 and 2: groups are concatenated and split over the ranks. The last weight partition has no padding."""
    from deepspeed.utils.tensor_fragment import fragment_address

    parts, moments, paddings = [], {}, []
    for index, group in enumerate(groups):
        flat, padding = torch.zeros(0), []
        for number, value in enumerate(group.values()):
            flat = torch.cat((flat, value.flatten()))
            padding.append(-flat.numel() % align if number + 1 < len(group) else 0)
            flat = torch.cat((flat, torch.full((padding[-1],), torch.nan)))
        size = -(-flat.numel() // (2 * ranks)) * 2
        paddings.append(padding)
        parts.append(flat[rank * size : (rank + 1) * size].clone())
        padded = torch.nn.functional.pad(flat, (0, size * ranks - flat.numel()))[rank * size : (rank + 1) * size]
        moments[index] = {"step": torch.tensor(5.0), "exp_avg": padded * 2, "exp_avg_sq": padded * 3}
    return {
        "base_optimizer_state": {"state": moments, "param_groups": [{"params": [index]} for index in moments]},
        "single_partition_of_fp32_groups": parts,
        "param_alignment_paddings": paddings,
        "partition_count": [ranks] * len(groups),
        "param_slice_mappings": [OrderedDict(any=fragment_address(numel=1, start=0))],
    }


def _each(groups: list[dict[str, Tensor]], ranks: int, rank: int) -> dict[str, Any]:
    """ZeRO 3: every parameter is split over the ranks; every two parameters form a sub-group."""
    flats = []
    for group in groups:
        cut = [torch.nn.functional.pad(v.flatten(), (0, -v.numel() % ranks)).chunk(ranks)[rank] for v in group.values()]
        flats += [torch.cat(cut[first : first + 2]) for first in range(0, len(cut), 2)]
    moments = {index: {"exp_avg": flat * 2, "exp_avg_sq": flat * 3} for index, flat in enumerate(flats)}
    return {
        "fp32_flat_groups": flats,
        "partition_count": ranks,
        STATE: {"state": moments, "param_groups": [{"params": list(moments)}]},
    }


def _stage(stage: int) -> Any:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return ZeroStageEnum(stage)


def _scaler() -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    return DynamicLossScaler(2.0**16, scale_window=1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)


MODEL, FIRST, LAST = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_2_mp_rank_00_optim_states.pt",
)


def small_run(folder: Path) -> RunConfig:
    """A run configuration. The files that it names do not exist: only the shapes matter."""
    sizes = {
        "model__layers": 1,
        "model__hidden": 16,
        "model__ffn": 22,
        "model__vocab_size": 30,
        "model__vocab_multiple": 7,
    }
    return tiny_run(folder / "corpus", folder, **sizes)


def weights_of(config: RunConfig) -> dict[str, Tensor]:
    model = build_model(config.model, config.recycle, seed=3)
    return {name: torch.rand_like(value) for name, value in model.named_parameters()}


def refusal(folder: Path, **options: Any) -> str:
    """Returns the one-line error of converting a folder; checks that no output is left behind."""
    target = folder.parent / "out"
    with pytest.raises(CheckpointError) as caught:
        convert(str(folder), str(target), Conversion("portable", **options))
    assert "\n" not in str(caught.value) and not target.exists()
    assert not list(folder.parent.glob(".tmp-*"))
    return str(caught.value)
