"""What a folder of weights holds, and how two of them differ."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from recycle_ds.checkpoint.megatron.reading import MegatronSource
from recycle_ds.checkpoint.reading import PortableSource
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source

PARTS = ("embedding", "blocks", "final_norm", "head", "recycle")


def describe(path: str | Path) -> dict[str, Any]:
    """Kind, step, layout, shape, parameters by part, types and provenance. Checksums are compared on the way.

    Raises CheckpointError for a folder that is none or is damaged.
    """
    source = open_source(path)
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
    if isinstance(source, MegatronSource):
        found["layout"] = source.layout
    return found


def compare(left_path: str | Path, right_path: str | Path) -> dict[str, Any]:
    """Tensors that only one of two folders has, that differ in shape, and by how much the others differ."""
    left, right = open_source(left_path), open_source(right_path)
    both = sorted(left.shapes.keys() & right.shapes.keys())
    shapes = [name for name in both if tuple(left.shapes[name]) != tuple(right.shapes[name])]
    values = {name: gap for name in both if name not in shapes and (gap := _gap(left, right, name)) is not None}
    found: dict[str, Any] = {
        "left": str(left.folder),
        "right": str(right.folder),
        "only_left": sorted(left.shapes.keys() - right.shapes.keys()),
        "only_right": sorted(right.shapes.keys() - left.shapes.keys()),
        "other_shape": {name: [list(left.shapes[name]), list(right.shapes[name])] for name in shapes},
        "other_values": values,
        "settings": _settings(left, right),
        "same": len(both) - len(shapes) - len(values),
    }
    found["equal"] = not any(found[key] for key in ("only_left", "only_right", "other_shape", "other_values"))
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
        print(f"{name}: differs by at most {gap:.3g}")
    for key, (left, right) in found["settings"].items():
        print(f"{key}: {left} and {right}")
    print(f"{found['same']} tensors are equal" + ("" if found["equal"] else "; the folders differ"))


def _gap(left: Source, right: Source, name: str) -> float | None:
    """The largest difference of a tensor's values, None where all are equal."""
    mine, theirs = left.read(name).double(), right.read(name).double()
    return None if torch.equal(mine, theirs) else float((mine - theirs).abs().max())


def _settings(left: Source, right: Source) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for section in ("model", "recycle"):
        mine, theirs = (getattr(source, section).model_dump(mode="json") for source in (left, right))
        found |= {f"{section}.{key}": [mine[key], theirs[key]] for key in mine if mine[key] != theirs[key]}
    return found
