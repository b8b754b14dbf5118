"""One bench as a process: `python -m recycle_ds.gpu_check.bench NAME RESULTS.jsonl [--small] [--model DIR]`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from recycle_ds.config.command import run_command
from recycle_ds.gpu_check.parts import BENCHES
from recycle_ds.gpu_check.running import announce

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Write = Callable[[dict[str, Any]], None]


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=", ".join(BENCHES))],
    results: Annotated[Path, typer.Argument(help="Figures are appended here as lines of JSON, as they come.")],
    small: Annotated[bool, typer.Option("--small", help="A size for a CPU: it shows that the bench runs.")] = False,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="SmolLM2-135M with a module; random weights without it.")
    ] = None,
) -> None:
    """Run one bench."""
    announce()
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()
    from recycle_ds.gpu_check import decoding_benches, kernel_benches, training_benches

    def write(figures: dict[str, Any]) -> None:
        with results.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"figures": figures}) + "\n")

    work = results.resolve().parent / "models"
    found: dict[str, Callable[[], None]] = {
        "machine": lambda: training_benches.machine(write, small),
        "training": lambda: training_benches.compared(write, small),
        "training_large": lambda: training_benches.large(write, small),
        "kernels": lambda: kernel_benches.kernels(write, small),
        "decoding": lambda: decoding_benches.decoding(write, small, model, work),
        "serving": lambda: decoding_benches.serving(write, small, model, work),
    }
    if name not in found:
        raise typer.BadParameter(f"{name}: no such bench; they are {', '.join(BENCHES)}")
    found[name]()


if __name__ == "__main__":
    run_command(app, None)
