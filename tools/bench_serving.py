"""Measures the engine's throughput by batch size and mode: a table on stdout; optionally the figures as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench_serving(
    model: Annotated[str, typer.Option(metavar="DIR", help="Run folder or checkpoint.")],
    prompts: Annotated[Path, typer.Option(metavar="FILE", help='.jsonl file, objects with "prompt".')],
    batches: Annotated[str, typer.Option(help="Prompts decoded at once; comma-separated.")] = "1,2,4,8,16,32",
    modes: Annotated[str, typer.Option(help="Comma-separated; factors are those to the first one.")] = (
        "autoregressive,verified"
    ),
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens to add to a prompt.")] = 96,
    draft_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Recycled tokens per full call; adaptive by default.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above 0 samples.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Decode the maximum number of tokens from every prompt.")] = False,
    dtype: Annotated[str, typer.Option(help="Arithmetic: fp32, bf16, or int8 (bf16 with weights of 8 bits).")] = "fp32",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; by default PyTorch's choice.")] = None,
    kv_memory_gib: Annotated[float | None, typer.Option(metavar="GIB", help="Memory of the KV cache.")] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="How often everything is run; speeds are medians.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Decode the prompts at every batch size in every mode, interleaved, and print one table."""
    from recycle_ds.checkpoint.portable.folders import check_folder
    from recycle_ds.inference.bench.outputs import check_output
    from recycle_ds.inference.errors import DecodingError
    from recycle_ds.inference.parameters import SamplingParams, check_batch, check_mode, check_runtime

    chosen = tuple(modes.replace(" ", "").split(","))
    for mode in chosen:
        check_mode(mode)
    check_runtime(dtype, threads)
    try:
        sizes = tuple(int(size) for size in batches.split(","))
    except ValueError:
        raise DecodingError(f"--batches {batches}: must be numbers, such as 1,8,32") from None
    check_batch(min(sizes), kv_memory_gib)
    if json_path is not None:
        check_output("json", json_path)
    check_folder(model)  # what needs no torch, which takes seconds to import, is checked first
    params = SamplingParams(
        temperature=temperature, max_new_tokens=max_new_tokens, draft_tokens=draft_tokens, ignore_eos=ignore_eos
    )
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before the imports that warn
    from recycle_ds.config.console import output_console
    from recycle_ds.inference.bench import serving
    from recycle_ds.inference.bench.comparison import write_report

    settings = serving.ServingSettings(sizes, chosen, params, repeats)
    report = serving.bench_serving(model, prompts, settings, dtype=dtype, threads=threads, kv_memory_gib=kv_memory_gib)
    output_console().print(serving.results_table(report))
    if json_path is not None:
        write_report(report, json_path)


if __name__ == "__main__":
    run_command(app, None)
