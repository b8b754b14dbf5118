"""Comparison of two folders of weights: whether they are the same model, and where they differ."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.recognition import is_deepspeed, open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.checkpoint.tensor_equality import value_difference
from recycle_ds.config import ModelConfig, RecycleConfig

_TRAINING_ONLY = ("model.vocab_multiple", "model.init_std")


def compare(left_path: str | Path, right_path: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """Compares two folders: tensors that only one of them has, differences in shape and value, and settings.

    config: the configuration for folders without one of their own. Settings that only training uses are reported, but do not
    count as a difference. Raises CheckpointError for a folder without a model, and for a damaged one.
    """
    left, right = _open_two(left_path, right_path, config)
    both = sorted(left.shapes.keys() & right.shapes.keys())
    shapes = [name for name in both if tuple(left.shapes[name]) != tuple(right.shapes[name])]
    values = {
        name: asdict(difference)
        for name in both
        if name not in shapes and (difference := value_difference(left.read(name), right.read(name))) is not None
    }
    settings = _settings(left, right)
    found: dict[str, Any] = {
        "left": str(left.folder),
        "right": str(right.folder),
        "only_left": sorted(left.shapes.keys() - right.shapes.keys()),
        "only_right": sorted(right.shapes.keys() - left.shapes.keys()),
        "other_shape": {name: [list(left.shapes[name]), list(right.shapes[name])] for name in shapes},
        "other_values": values,
        "settings": {key: pair for key, pair in settings.items() if not _is_training_only(key)},
        "training_settings": {key: pair for key, pair in settings.items() if _is_training_only(key)},
        "same": len(both) - len(shapes) - len(values),
    }
    found["equal"] = not any(
        found[key] for key in ("only_left", "only_right", "other_shape", "other_values", "settings")
    )
    return found


def print_comparison(found: dict[str, Any], *, as_json: bool) -> None:
    """Prints a comparison to stdout, as JSON or as lines."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name in found["only_left"]:
        print(f"only in {found['left']}: {name}")
    for name in found["only_right"]:
        print(f"only in {found['right']}: {name}")
    for name, (left, right) in found["other_shape"].items():
        print(f"{name}: shape {left} and {right}")
    for name, difference in found["other_values"].items():
        print(f"{name}: {_describe(difference)}")
    for key, (left, right) in found["settings"].items():
        print(f"{key}: {left} and {right}")
    for key, (left, right) in found["training_settings"].items():
        print(f"{key}: {left} and {right} (used in training only)")
    print(f"{found['same']} tensors are equal" + ("" if found["equal"] else "; the folders differ"))


def _describe(difference: dict[str, Any]) -> str:
    parts = []
    if difference["gap"] or not difference["not_finite"]:
        parts.append(f"differs by at most {difference['gap']:.3g}")
    if difference["not_finite"]:
        parts.append(f"{difference['not_finite']} values are NaN or infinite on one side only")
    return "; ".join(parts)


def _open_two(left: str | Path, right: str | Path, config: str | Path | None) -> tuple[Source, Source]:
    """Opens both folders; `config` goes to those that take one. If neither does, opening the first one with it fails."""
    takes_config = [config is not None and is_deepspeed(Path(path)) for path in (left, right)]
    given = [config if takes_it or not any(takes_config) else None for takes_it in takes_config]
    return open_source(left, config=given[0]), open_source(right, config=given[1])


def _is_training_only(key: str) -> bool:
    """Whether a setting has no effect on what a model computes with given weights."""
    return key in _TRAINING_ONLY or (key.startswith("recycle.") and key != "recycle.layers")


def _settings(left: Source, right: Source) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for section in ("model", "recycle"):
        one, other = (_normalised(getattr(source, section)) for source in (left, right))
        found |= {f"{section}.{key}": [one[key], other[key]] for key in one if one[key] != other[key]}
    return found


def _normalised(section: ModelConfig | RecycleConfig) -> dict[str, Any]:
    """The section as JSON; equivalent ways of writing the same setting become one."""
    tree = section.model_dump(mode="json")
    if isinstance(section, ModelConfig):
        tree["head_dim"] = section.dim_per_head
        scaling = section.rope.scaling
        if scaling is not None and scaling.kind == "linear":
            tree["rope"]["scaling"] = {"kind": "linear", "factor": scaling.factor}
    return tree
