"""Compares the decoding modes on a file of prompts: a table on stdout; optionally the figures as JSON and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench_decoding(
    model: Annotated[str, typer.Option(metavar="DIR", help="Run folder, checkpoint or model folder.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='.jsonl file, objects with "prompt", "kind"; by default the 60 that ship with the package.',
        ),
    ] = None,
    template: Annotated[
        bool | None,
        typer.Option(
            "--template/--no-template",
            help='Render prompts without "raw" by the model\'s chat template; by default only those that ship.',
        ),
    ] = None,
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
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Above temperature 0: samples every mode with the same random numbers, so that texts compare."
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Other programs, comma-separated: transformers, prompt_lookup, llama.cpp; all: those that are installed.",
        ),
    ] = "",
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The model for llama.cpp, in any type: others are made from it.")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="How often everything is run; speeds are medians.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures here (.png, .svg, .pdf).")] = None,
) -> None:
    """Decode every prompt in every mode and with every peer, interleaved, and print tables."""
    from recycle_ds.checkpoint.portable.folders import check_folder
    from recycle_ds.inference.bench.outputs import PLOTS, check_output
    from recycle_ds.inference.bench.peers import PeerRequest
    from recycle_ds.inference.parameters import TokenSampling, check_mode, check_runtime

    chosen = tuple(modes.replace(" ", "").split(","))
    for mode in chosen:
        check_mode(mode)
    check_runtime(dtype, threads)
    TokenSampling(temperature=temperature, seed=seed)
    request = PeerRequest.parse(peers, gguf)
    if json_path is not None:
        check_output("json", json_path)
    if plot is not None:
        check_output("plot", plot, PLOTS)
    check_folder(model)  # what needs no torch, which takes seconds to import, is checked first
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before the imports that warn
    from recycle_ds.inference.bench.comparison import BenchSettings, bench_model, write_report
    from recycle_ds.inference.bench.tables import print_result

    settings = BenchSettings(chosen, max_new_tokens, draft_tokens, repeats, temperature, seed, details=True)
    result = bench_model(
        model,
        prompts,
        settings,
        dtype=dtype,
        threads=threads,
        template=template,
        peers=request,
    )
    print_result(result)
    if json_path is not None:
        write_report(result.report, json_path)
    if plot is not None:
        from recycle_ds.inference.bench.plots import plot_decoding

        plot_decoding(result.report, plot)


if __name__ == "__main__":
    run_command(app, None)
