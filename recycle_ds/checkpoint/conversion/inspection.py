"""What a folder of weights holds, and how two of them differ."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from recycle_ds.checkpoint.deepspeed_native.reading import DeepSpeedSource
from recycle_ds.checkpoint.megatron.reading import MegatronSource
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.recognition import is_deepspeed, open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.checkpoint.tensor_equality import gap_between
from recycle_ds.config import ModelConfig, RecycleConfig

PARTS = ("embedding", "blocks", "final_norm", "head", "recycle")
_TRAINING_ONLY = ("model.vocab_multiple", "model.init_std")


def describe(path: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """Kind, step, layout, shape, parameters by part, types and provenance. Checksums are compared on the way.

    config: the configuration of a source that does not hold its own. Raises CheckpointError for a folder that is none or is
    damaged.
    """
    source = open_source(path, config=config)
    counts: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for name, shape in source.shapes.items():
        counts[name.split(".")[0]] += torch.Size(shape).numel()
        types[str(source.dtype(name)).removeprefix("torch.")] += 1
    found: dict[str, Any] = {
        "kind": source.kind,
        "folder": str(source.folder),
        "step": source.step,
        "parameters": sum(counts.values()),
        "parameters_by_part": {part: counts[part] for part in PARTS if counts[part]},
        "tensors": len(source.shapes),
        "dtypes": dict(types),
        "tokenizer": source.tokenizer is not None,
        "model": source.model.model_dump(mode="json"),
        "recycle": source.recycle.model_dump(mode="json") if source.recycle.layers else None,
        "notes": list(source.notes),
    }
    if isinstance(source, PortableSource):
        manifest = source.manifest
        found |= {
            "layout": manifest.layout,
            "optimizer_state": any(source.has(name, "exp_avg") for name in source.shapes),
            "files": len(manifest.files),
            "bytes": sum(entry.bytes for entry in manifest.files.values()),
            "checksums": "hold",
            "provenance": manifest.provenance,
        }
    if isinstance(source, MegatronSource | DeepSpeedSource):
        found["layout"] = source.layout
    return found


def compare(left_path: str | Path, right_path: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """Whether two folders are one model: tensors that only one has, that differ in shape or in value, and settings.

    config: the configuration of those that do not hold their own. Settings that only a training reads are told, not counted.
    Raises CheckpointError for a folder that is none or is damaged.
    """
    left, right = _open_two(left_path, right_path, config)
    both = sorted(left.shapes.keys() & right.shapes.keys())
    shapes = [name for name in both if tuple(left.shapes[name]) != tuple(right.shapes[name])]
    values = {
        name: asdict(gap)
        for name in both
        if name not in shapes and (gap := gap_between(left.read(name), right.read(name))) is not None
    }
    settings = _settings(left, right)
    found: dict[str, Any] = {
        "left": str(left.folder),
        "right": str(right.folder),
        "only_left": sorted(left.shapes.keys() - right.shapes.keys()),
        "only_right": sorted(right.shapes.keys() - left.shapes.keys()),
        "other_shape": {name: [list(left.shapes[name]), list(right.shapes[name])] for name in shapes},
        "other_values": values,
        "settings": {key: pair for key, pair in settings.items() if not _only_trains(key)},
        "training_settings": {key: pair for key, pair in settings.items() if _only_trains(key)},
        "same": len(both) - len(shapes) - len(values),
    }
    found["equal"] = not any(
        found[key] for key in ("only_left", "only_right", "other_shape", "other_values", "settings")
    )
    return found


def print_description(found: dict[str, Any], *, as_json: bool) -> None:
    """To stdout, as JSON or as a table."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(show_header=False)
    shown = {
        key: value
        for key, value in found.items()
        if key not in ("parameters_by_part", "provenance", "model", "recycle")
    }
    for key, value in shown.items():
        if value not in (None, [], {}):
            table.add_row(key, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    for part, count in found["parameters_by_part"].items():
        table.add_row(f"  {part}", f"{count:,}")
    for section in ("model", "recycle", "provenance"):
        if found.get(section):
            table.add_row(
                section, ", ".join(f"{key}={value}" for key, value in found[section].items() if value is not None)
            )
    Console().print(table)


def print_comparison(found: dict[str, Any], *, as_json: bool) -> None:
    """To stdout, as JSON or as lines."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name in found["only_left"]:
        print(f"only in {found['left']}: {name}")
    for name in found["only_right"]:
        print(f"only in {found['right']}: {name}")
    for name, (left, right) in found["other_shape"].items():
        print(f"{name}: shape {left} and {right}")
    for name, gap in found["other_values"].items():
        print(f"{name}: {_told(gap)}")
    for key, (left, right) in found["settings"].items():
        print(f"{key}: {left} and {right}")
    for key, (left, right) in found["training_settings"].items():
        print(f"{key}: {left} and {right} (read in training only)")
    print(f"{found['same']} tensors are equal" + ("" if found["equal"] else "; the folders differ"))


def _told(gap: dict[str, Any]) -> str:
    parts = []
    if gap["gap"] or not gap["not_finite"]:
        parts.append(f"differs by at most {gap['gap']:.3g}")
    if gap["not_finite"]:
        parts.append(f"{gap['not_finite']} values are NaN or infinite on one side only")
    return "; ".join(parts)


def _open_two(left: str | Path, right: str | Path, config: str | Path | None) -> tuple[Source, Source]:
    """Both, with the configuration for those that take one; if neither does, the first refuses it."""
    takes = [config is not None and is_deepspeed(Path(path)) for path in (left, right)]
    given = [config if takes_it or not any(takes) else None for takes_it in takes]
    return open_source(left, config=given[0]), open_source(right, config=given[1])


def _only_trains(key: str) -> bool:
    """Whether a setting changes nothing of what a model with its weights computes."""
    return key in _TRAINING_ONLY or (key.startswith("recycle.") and key != "recycle.layers")


def _settings(left: Source, right: Source) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for section in ("model", "recycle"):
        mine, theirs = (_plain(getattr(source, section)) for source in (left, right))
        found |= {f"{section}.{key}": [mine[key], theirs[key]] for key in mine if mine[key] != theirs[key]}
    return found


def _plain(section: ModelConfig | RecycleConfig) -> dict[str, Any]:
    """As JSON, in one spelling of what can be written in two."""
    tree = section.model_dump(mode="json")
    if isinstance(section, ModelConfig):
        tree["head_dim"] = section.dim_per_head
        scaling = section.rope.scaling
        if scaling is not None and scaling.kind == "linear":
            tree["rope"]["scaling"] = {"kind": "linear", "factor": scaling.factor}
    return tree
