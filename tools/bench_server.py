"""Measures a server under load, by number of clients and mode: a table on stdout; optionally the figures as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench_server(
    prompts: Annotated[Path, typer.Option(metavar="FILE", help='.jsonl file, objects with "prompt".')],
    url: Annotated[str | None, typer.Option(help="A running server, such as http://127.0.0.1:8000.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File whose first line is a key of the running server.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model of the running server; by default its only one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Run folder or checkpoint: a server is started for it.")
    ] = None,
    clients: Annotated[str, typer.Option(help="Clients at once; comma-separated.")] = "1,8,32",
    modes: Annotated[str, typer.Option(help="Comma-separated; factors are those to the first one.")] = (
        "autoregressive,verified"
    ),
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens of a request, on average.")] = 64,
    draft_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Recycled tokens per full call; adaptive by default.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above 0 samples.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Decode the maximum number of tokens from every prompt.")] = False,
    requests: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of each measurement; by default every prompt once, and two for every client."),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="How often everything is run; speeds are medians.")] = 2,
    dtype: Annotated[str, typer.Option(help="Arithmetic of the started server: fp32 or bf16.")] = "fp32",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads of the started server.")] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Batch of the started server; by default one place for every client."),
    ] = None,
    kv_memory_gib: Annotated[float | None, typer.Option(metavar="GIB", help="KV cache of the started server.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
) -> None:
    """Let clients send the prompts to a server in every mode, interleaved, and print one table."""
    from recycle_ds.config.atomic_files import write_json_atomically
    from recycle_ds.config.console import output_console
    from recycle_ds.inference.bench.comparison import read_prompts
    from recycle_ds.serving.access import read_keys
    from recycle_ds.serving.bench.client import Target
    from recycle_ds.serving.bench.load import LoadSettings
    from recycle_ds.serving.bench.report import bench_own_server, results_table
    from recycle_ds.serving.bench.report import bench_server as bench
    from recycle_ds.serving.process.errors import ServingError

    if (url is None) == (model is None):
        raise ServingError("give either --url of a running server or --model DIR, for which one is started")
    try:
        counts = tuple(int(count) for count in clients.split(","))
    except ValueError:
        raise ServingError(f"--clients {clients}: must be numbers, such as 1,8,32") from None
    fields = {"temperature": temperature, "ignore_eos": ignore_eos, "draft_tokens": draft_tokens}
    chosen = tuple(modes.replace(" ", "").split(","))
    settings = LoadSettings(counts, chosen, max_new_tokens, repeats, requests, fields)
    texts = read_prompts(prompts)
    if model is not None:
        report = bench_own_server(
            model,
            texts,
            settings,
            dtype=dtype,
            threads=threads,
            max_batch=max_batch,
            kv_memory_gib=kv_memory_gib,
        )
    else:
        assert url is not None
        key = read_keys(api_key_file)[0] if api_key_file is not None else None
        report = bench(Target(url.rstrip("/").removesuffix("/v1"), key, model_name), texts, settings)
    output_console().print(results_table(report))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(json_path, report)


if __name__ == "__main__":
    run_command(app, None)
