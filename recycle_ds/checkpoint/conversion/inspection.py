"""Description of a folder of weights: format, layout, sizes, dtypes, provenance, integrity."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from recycle_ds.checkpoint.deepspeed_native.reading import DeepSpeedSource
from recycle_ds.checkpoint.megatron.reading import MegatronSource
from recycle_ds.checkpoint.portable.reading import PortableSource
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.tokenizer_check import tokenizer_notes
from recycle_ds.config.console import output_console

_WIDTH = 60  # of the table's second column, so that the table fits 80 columns
PARTS = ("embedding", "blocks", "final_norm", "head", "recycle")


def describe(path: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """Kind, step, layout, shape, parameters by part, dtypes and provenance of a folder. Compares its checksums.

    config: the configuration for a source without one of its own. Raises CheckpointError for a folder without a model,
    and for a damaged one."""
    source = open_source(path, config=config)
    counts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, shape in source.shapes.items():
        counts[name.split(".")[0]] += torch.Size(shape).numel()
        dtypes[str(source.dtype(name)).removeprefix("torch.")] += 1
    found: dict[str, Any] = {
        "kind": source.kind,
        "folder": str(source.folder),
        "step": source.step,
        "parameters": sum(counts.values()),
        "parameters_by_part": {part: counts[part] for part in PARTS if counts[part]},
        "tensors": len(source.shapes),
        "dtypes": dict(dtypes),
        "tokenizer": source.tokenizer is not None,
        "model": source.model.model_dump(mode="json"),
        "recycle": source.recycle.model_dump(mode="json") if source.recycle.layers else None,
        "notes": [*source.notes, *tokenizer_notes(source)],
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


def print_description(found: dict[str, Any], *, as_json: bool) -> None:
    """Prints a description to stdout, as JSON or as a table."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(show_header=False)
    rows = {
        key: value
        for key, value in found.items()
        if key not in ("parameters_by_part", "provenance", "model", "recycle")
    }
    for key, value in rows.items():
        if value not in (None, [], {}):
            table.add_row(key.replace("_", " "), _shown(value))
    for part, count in found["parameters_by_part"].items():
        table.add_row(f"  {part}", f"{count:,}")
    for section in ("model", "recycle", "provenance"):
        if found.get(section):
            table.add_row(section, _shown(found[section]))
    output_console().print(table)


def _shown(value: Any) -> str:
    """A value as text for the table: no Python notation, and sections in lines of about `_WIDTH` characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, dict):
        return str(value) if not isinstance(value, list) else "\n".join(_wrapped(str(one)) for one in value)
    settings = [f"{key}={_setting(one)}" for key, one in _flat(value).items() if one not in (None, [])]
    return _wrapped(", ".join(settings))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A section with the keys of inner ones as `outer.inner`."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
