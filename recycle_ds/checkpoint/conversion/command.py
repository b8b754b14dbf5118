"""What `tools/convert_checkpoint.py` does around a conversion: a progress bar, and what came of it."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.model.flops import parameters


def run(source: str, target: str, conversion: Conversion) -> None:
    """Converts and prints one line. Progress goes to stderr, on a terminal only. Raises CheckpointError."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def step(what: str, count: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=count)
            progress.advance(tasks[what])

        notes: list[str] = []
        result = convert(source, target, conversion, step, notes.append)
    for note in dict.fromkeys((*notes, *result.notes)):
        print(f"note: {note}")
    module = f", recycle module of {result.recycle.layers} layer(s)" if result.recycle.layers else ""
    count = parameters(result.model, result.recycle)
    print(f"{target}: {count:,} weights in {len(result.shapes)} tensors{module}, {conversion.target}")
