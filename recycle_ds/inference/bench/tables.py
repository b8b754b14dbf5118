"""The tables of a decoding comparison."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from recycle_ds.config.console import output_console
from recycle_ds.inference.bench.comparison import BenchResult
from recycle_ds.inference.bench.parts import PARTS
from recycle_ds.inference.bench.setting import described


def print_result(result: BenchResult) -> None:
    """Prints the tables, followed by the notes, to stdout."""
    console = output_console()
    report = result.report
    for table in (results_table(report), kinds_table(report), acceptance_table(report), parts_table(report)):
        if table is not None:
            console.print(table)
    for note in (*quality_notes(report), *result.notes):
        console.print(note, soft_wrap=True, highlight=False)


def results_table(report: dict[str, Any]) -> Table:
    """The modes, and the peers below them."""
    table = _table(
        f"Decoding {report['model']}  ({described(report)})",
        *("mode", "tokens/s", "speedup", "tokens per full call", "acceptance by position", "identical"),
    )
    same = {True: "yes", False: "no", None: "-"}
    for name, figures in _all(report).items():
        calls = figures.get("tokens_per_full_call")
        label = name if calls is not None else f"{name} {figures['version']} ({figures['dtype']})"
        table.add_row(
            label,
            f"{figures['tokens_per_second']:.1f}",
            f"{figures['speedup']:.2f}x",
            "-" if calls is None else f"{calls:.2f}",
            " ".join(f"{value:.2f}" for value in figures.get("acceptance", ())) or "-",
            same[figures["identical_to_autoregressive"]],
        )
    return table


def kinds_table(report: dict[str, Any]) -> Table | None:
    """Tokens per second by kind of prompt, with the factor over `autoregressive` on the same prompts."""
    kinds = list(next(iter(report["modes"].values())).get("kinds", {}))
    if not kinds:
        return None
    table = _table("Tokens per second by kind of prompt (factor over autoregressive)", "mode", *kinds)
    for name, figures in _all(report).items():
        cells = [figures["kinds"][kind] for kind in kinds]
        table.add_row(name, *(f"{one['tokens_per_second']:.1f} ({_factor(one['speedup'])})" for one in cells))
    return table


def acceptance_table(report: dict[str, Any]) -> Table | None:
    """Acceptance of `verified` by position, and tokens per full call, by kind of prompt."""
    kinds = report["modes"].get("verified", {}).get("kinds")
    if not kinds:
        return None
    table = _table("verified, by kind of prompt", "kind", "prompts", "tokens per full call", "acceptance by position")
    for kind, one in kinds.items():
        rates = " ".join(f"{value:.2f}" for value in one["acceptance"]) or "-"
        table.add_row(kind, str(one["prompts"]), f"{one['tokens_per_full_call']:.2f}", rates)
    return table


def parts_table(report: dict[str, Any]) -> Table | None:
    """Milliseconds per new token by part of a step, from a pass of its own."""
    found = {mode: figures.get("milliseconds_per_token") for mode, figures in report["modes"].items()}
    if not any(found.values()):
        return None
    headings = ("mode", *(part.replace("_", " ") for part in PARTS), "total")
    table = _table("Milliseconds per new token, in a separate pass with timers", *headings)
    for mode, parts in found.items():
        if parts:
            table.add_row(mode, *(f"{parts[name]:.2f}" for name in (*PARTS, "total")))
    return table


def quality_notes(report: dict[str, Any]) -> list[str]:
    """One line for each mode whose quality was measured."""
    notes = []
    for mode, figures in report["modes"].items():
        if not (one := figures.get("quality")):
            continue
        note = (
            f"{mode}: {one['log_likelihood']:.3f} nats per token under the full model (autoregressive's text "
            f"{one['log_likelihood_autoregressive']:.3f})"
        )
        if "agreement" in one:
            note += (
                f"; the same tokens as autoregressive for the first {one['tokens_before_divergence']:.1f} on average, "
                f"{one['agreement']:.1%} agreement up to the first that differs"
            )
        notes.append(note)
    return notes


def _all(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {**report["modes"], **report.get("peers", {})}


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table
