"""Host memory that conversions of a model take, as a share of its size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench_conversion(
    model: Annotated[str, typer.Option(metavar="DIR", help="Model of any known format, without a deep module.")],
    shard_gib: Annotated[float, typer.Option(metavar="GIB", help="Largest file.")] = 1.0,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Convert to portable, Hugging Face, Megatron (two stages) and back, and print the peak of each."""
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()
    from rich.console import Console
    from rich.table import Table

    from recycle_ds.checkpoint.conversion.memory import measure

    found = measure(model, shard_gib)
    title = f"{model}: {found['model_mib']:.0f} MiB; a process that converts nothing takes {found['idle_mib']:.0f} MiB"
    table = Table("from", "to", "MiB beyond that", "share of the model", title=title)
    for row in found["conversions"]:  # type: ignore[attr-defined]
        table.add_row(row["source"], row["target"], f"{row['peak_mib']:.0f}", f"{row['share']:.0%}")
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(app, None)
