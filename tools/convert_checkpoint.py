"""Weights from one format to another: Hugging Face, portable, Megatron, DeepSpeed's own."""

from __future__ import annotations

from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def convert_checkpoint(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Run, checkpoint or model folder; its format is recognised.")
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to make; it must not exist, or be empty.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf, portable or megatron.")],
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="fp32, bf16 or fp16; by default each tensor keeps its own.")
    ] = None,
    shard_gib: Annotated[
        float, typer.Option(metavar="GIB", help="hf, portable: largest file, and about the memory that is used.")
    ] = 1.0,
    tp: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="megatron: tensor-parallel ranks that its files are cut for; it loads at any."
        ),
    ] = 1,
    pp: Annotated[int, typer.Option(metavar="N", min=1, help="megatron: pipeline stages, likewise.")] = 1,
    verify: Annotated[bool, typer.Option(help="Read the result back and compare every tensor.")] = True,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="DeepSpeed's folders: the run's config.yaml or the model's config.json."),
    ] = None,
    recycle_layers: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Add a newly initialised recycle module to a model without one; 0 adds none."
        ),
    ] = 0,
    recycle_depth: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Tokens ahead that it is to be unrolled for in training; 1 by default."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="SEED", min=0, help="Of its weights: those that a run of this training.seed begins with."),
    ] = None,
) -> None:
    """Convert a model. The result is written under a temporary name, compared with the source, and then renamed."""
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()
    from recycle_ds.checkpoint.conversion.command import run
    from recycle_ds.checkpoint.conversion.convert import Conversion

    conversion = Conversion(to, dtype, shard_gib, tp, pp, verify, config, recycle_layers, recycle_depth, seed)
    run(source, target, conversion)


if __name__ == "__main__":
    run_command(app, None)
