"""The report on a server under load: its own or a running one; a table of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from recycle_ds.config.console import output_console
from recycle_ds.serving.bench.client import Client, Target
from recycle_ds.serving.bench.load import LoadSettings, measure
from recycle_ds.serving.bench.own_server import own_server
from recycle_ds.serving.process.errors import ServingError


def bench_server(target: Target, prompts: Sequence[str], settings: LoadSettings) -> dict[str, Any]:
    """`measure` for a running server, with a progress bar on stderr if that is a terminal."""
    client = Client(target)
    try:
        model = client.get("/v1/models")["data"][0]
    finally:
        client.close()
    wrong = [mode for mode in settings.modes if mode not in model.get("modes", ())]
    if wrong:
        raise ServingError(f"--modes: the server at {target.url} has no mode {wrong[0]}; leave it out")
    columns = (TextColumn("clients"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = output_console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("clients", total=None)
        found = measure(
            Target(target.url, target.key, target.model or model["id"]),
            prompts,
            settings,
            lambda done, of: progress.update(task, completed=done, total=of),
        )
    return {"clients": found, "model": target.model or model["id"], "url": target.url}


def bench_own_server(
    model: str,
    prompts: Sequence[str],
    settings: LoadSettings,
    *,
    dtype: str,
    threads: int | None,
    max_batch: int | None,
    kv_memory_gib: float | None,
) -> dict[str, Any]:
    """The same for a server that runs for this only. max_batch: by default the largest number of clients."""
    options = ["--dtype", dtype, "--max-batch", str(max_batch or max(settings.clients))]
    most = max(settings.clients)
    options += ["--max-requests", str(max(most, 256)), "--max-queued", str(max(most, 256))]
    options += [] if threads is None else ["--threads", str(threads)]
    options += [] if kv_memory_gib is None else ["--kv-memory-gib", str(kv_memory_gib)]
    with own_server(model, *options) as url:
        report = bench_server(Target(url), prompts, settings)
    from recycle_ds.parallel.device import local_device, machine_name

    del report["url"]  # gone
    return report | {"model": model, "dtype": dtype, "machine": machine_name(local_device())}


def results_table(report: dict[str, Any]) -> Table:
    """The report as a table; the factor compares with the first mode at the same number of clients."""
    about = ", ".join(report[name] for name in ("dtype", "machine", "url") if name in report)
    table = Table(title=f"Server {report['model']}  ({about})", title_justify="left")
    headings = ("clients", "mode", "tokens/s", "factor", "first token p50", "p99", "per token p50", "p99")
    for heading in (*headings, "tokens per full call", "acceptance"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for clients, modes in report["clients"].items():
        base = next(iter(modes.values()))["tokens_per_second"]
        for mode, figures in modes.items():
            first, token = figures["time_to_first_token"], figures["time_per_output_token"] or {}
            table.add_row(
                clients,
                mode,
                f"{figures['tokens_per_second']:.1f}",
                f"{figures['tokens_per_second'] / base:.2f}x",
                *(f"{1000 * first[name]:.0f} ms" for name in ("p50", "p99")),
                *(f"{1000 * token[name]:.1f} ms" if name in token else "-" for name in ("p50", "p99")),
                f"{figures['tokens_per_full_call']:.2f}",
                " ".join(f"{value:.2f}" for value in figures["acceptance"][:4]) or "-",
            )
    return table
