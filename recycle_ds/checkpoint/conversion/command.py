"""The command `recycle-ds convert` (tools/convert_checkpoint.py): options, a progress bar, one line about the
result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from recycle_ds.checkpoint.conversion.options import Conversion
from recycle_ds.checkpoint.files.new_folder import check_target
from recycle_ds.checkpoint.portable.folders import check_folder
from recycle_ds.config.command import run_command
from recycle_ds.config.console import output_console

if TYPE_CHECKING:
    from rich.progress import TaskID

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def convert_checkpoint(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Run, checkpoint or model folder; its format is detected.")
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to create; it must not exist, or be empty.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf, portable, megatron or vllm (vLLM, SGLang).")],
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="fp32, bf16 or fp16; by default each tensor keeps its dtype.")
    ] = None,
    shard_gib: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", help="All but megatron: maximum file size, and roughly the memory used; 1 by default."
        ),
    ] = None,
    tp: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="megatron: tensor-parallel ranks to shard the files for; any number can load them."
        ),
    ] = 1,
    pp: Annotated[int, typer.Option(metavar="N", min=1, help="megatron: pipeline stages, in the same way.")] = 1,
    verify: Annotated[bool, typer.Option(help="Read the result back and compare every tensor.")] = True,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For DeepSpeed folders: the run's config.yaml or the model's config.json."),
    ] = None,
    recycle_layers: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Add a newly initialised recycle module to a model without one; 0 adds none."
        ),
    ] = 0,
    recycle_depth: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Unrolled steps of the new module in training; 1 by default."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="SEED", min=0, help="Seed of its weights, as training.seed of a run."),
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draft among the N most frequent tokens only: faster; 0 drafts among all."),
    ] = None,
    rank_tokens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX", help="Token files to count them in; repeatable. By default the model's ranking."
        ),
    ] = None,
    before_norm: Annotated[
        bool,
        typer.Option(
            "--before-norm", help="vllm: for vLLM itself, which gives the module the states before the final norm."
        ),
    ] = False,
) -> None:
    """Convert a model. The result is written under a temporary name, compared with the source, and then renamed."""
    # checks that do not import torch, which takes seconds, come first
    new_module = (recycle_layers, recycle_depth, seed)
    drafts = (draft_vocabulary, tuple(rank_tokens or ()))
    conversion = Conversion(to, dtype, shard_gib, tp, pp, verify, config, *new_module, *drafts, before_norm)
    conversion.check()
    check_folder(source)
    check_target(target)
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()
    run(source, target, conversion)


def run(source: str, target: str, conversion: Conversion) -> None:
    """Converts, and prints one line about the result. Progress goes to stderr if that is a terminal. Raises
    CheckpointError."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from recycle_ds.checkpoint.conversion.convert import convert
    from recycle_ds.model.flops import parameters

    console = output_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def step(phase: str, count: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=count)
            progress.advance(tasks[phase])

        notes: list[str] = []
        result = convert(source, target, conversion, step, notes.append)
    for note in dict.fromkeys((*notes, *result.notes)):
        print(f"note: {note}")
    module = f", recycle module of {result.recycle.layers} layer(s)" if result.recycle.layers else ""
    count = parameters(result.model, result.recycle)
    print(f"{target}: {count:,} weights in {len(result.shapes)} tensors{module}, {conversion.target}")


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments."""
    run_command(app, argv)
