"""Measures the host memory of conversions of a model, as a fraction of its size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench_conversion(
    model: Annotated[str, typer.Option(metavar="DIR", help="Model in any supported format, recycle.layers at most 1.")],
    shard_gib: Annotated[float, typer.Option(metavar="GIB", help="Maximum file size.")] = 1.0,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Convert to portable, Hugging Face, Megatron (two stages) and back, and print each conversion's peak memory."""
    from recycle_ds.checkpoint.conversion.options import Conversion
    from recycle_ds.checkpoint.portable.folders import check_folder

    # checks that do not import torch, which takes seconds, come first
    Conversion("hf", shard_gib=shard_gib).check()
    check_folder(model)
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()
    from rich.table import Table

    from recycle_ds.checkpoint.conversion.memory import measure
    from recycle_ds.config.atomic_files import write_json_atomically
    from recycle_ds.config.console import output_console

    found = measure(model, shard_gib)
    title = f"{model}: {found['model_mib']:.0f} MiB; a process that converts nothing takes {found['idle_mib']:.0f} MiB"
    table = Table("from", "to", "MiB beyond that", "share of the model", title=title)
    for row in found["conversions"]:  # type: ignore[attr-defined]
        table.add_row(row["source"], row["target"], f"{row['peak_mib']:.0f}", f"{row['share']:.0%}")
    output_console().print(table)
    if json_path is not None:
        write_json_atomically(json_path, found)


if __name__ == "__main__":
    run_command(app, None)
