"""Compares the decoding modes on a file of prompts: a table on stdout; optionally the figures as JSON and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench_decoding(
    model: Annotated[str, typer.Option(metavar="DIR", help="Run folder or checkpoint.")],
    prompts: Annotated[Path, typer.Option(metavar="FILE", help='.jsonl file, objects with "prompt".')],
    modes: Annotated[
        str, typer.Option(help="Comma-separated; autoregressive is always run, as the reference.")
    ] = "autoregressive,alternate,verified",
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of tokens to add to each prompt.")
    ] = 128,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Recycled tokens per full call; by default 1 in alternate, adaptive in verified."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic: fp32, bf16, or int8 (bf16 with weights of 8 bits).")] = "fp32",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; by default PyTorch's choice.")] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="How often everything is run; speeds are medians.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures here (.png, .svg, .pdf).")] = None,
) -> None:
    """Decode every prompt in every mode, interleaved, and print one table."""
    from recycle_ds.checkpoint.portable.folders import check_folder
    from recycle_ds.inference.parameters import check_mode, check_runtime

    chosen = tuple(modes.replace(" ", "").split(","))
    for mode in chosen:
        check_mode(mode)
    check_runtime(dtype, threads)
    check_folder(model)  # what needs no torch, which takes seconds to import, is checked first
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before the imports that warn
    from recycle_ds.inference.bench.comparison import BenchSettings, bench_model, print_result, write_report

    settings = BenchSettings(chosen, max_new_tokens, draft_tokens, repeats)
    result = bench_model(model, prompts, settings, dtype=dtype, threads=threads)
    print_result(result)
    if json_path is not None:
        write_report(result.report, json_path)
    if plot is not None:
        from recycle_ds.inference.bench.plots import plot_decoding

        plot_decoding(result.report, plot)


if __name__ == "__main__":
    run_command(app, None)
