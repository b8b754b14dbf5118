"""The report of a check, written anew after each part: what is there stays if the check is killed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recycle_ds.config.atomic_files import write_atomically, write_json_atomically
from recycle_ds.gpu_check.claims import compare_with_before, figures_of, judge_all
from recycle_ds.gpu_check.part import NOT_RUN, PASSED, Result
from recycle_ds.gpu_check.parts import CheckSettings

REHEARSAL = (
    "**A rehearsal on a CPU**: it shows that the parts run. No figure here says anything about a GPU, and nothing is borne "
    "out by it."
)


class Report:
    """Collects the results of parts."""

    def __init__(self, settings: CheckSettings, machine: Mapping[str, object], names: Sequence[str]) -> None:
        """machine: name, memory and versions. names: the parts that are to run."""
        self._settings, self._machine, self._names = settings, dict(machine), list(names)
        self._started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._results: dict[str, Result] = {}

    @property
    def results(self) -> list[Result]:
        """Of all parts, in their order; those that have not ended were not run."""
        return [self._results.get(name, Result(name, NOT_RUN)) for name in self._names]

    def add(self, result: Result) -> None:
        """Adds a part that has ended."""
        self._results[result.name] = result

    def write(self, seconds: float, *, complete: bool = False) -> None:
        """Writes report.json and report.md. seconds: since the start. complete: whether no part will follow."""
        tree = self._tree(seconds, complete)
        folder = self._settings.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / "report.json", tree)
        write_atomically(folder / "report.md", as_markdown(tree))

    def _tree(self, seconds: float, complete: bool) -> dict[str, Any]:
        settings, results = self._settings, {result.name: result for result in self.results}
        return {
            "complete": complete,
            "rehearsal": settings.rehearsal,
            "machine": self._machine,
            "model": "random weights of SmolLM2-135M's shape" if settings.model is None else str(settings.model),
            "started": self._started,
            "seconds": seconds,
            "minutes_at_most": settings.minutes,
            "claims": judge_all(results, rehearsal=settings.rehearsal),
            "parts": {name: result.report() for name, result in results.items()},
            "figures": figures_of(results),
            "before": compare_with_before(results),
        }


def as_markdown(tree: Mapping[str, Any]) -> str:
    """report.md from the tree of report.json."""
    machine, parts = tree["machine"], tree["parts"]
    good = sum(one["state"] == PASSED for one in parts.values())
    lines = [f"# Check on {machine.get('name', 'an unknown machine')}", ""]
    lines += [REHEARSAL, ""] if tree["rehearsal"] else []
    lines += [
        ", ".join(f"{key} {value}" for key, value in machine.items() if key != "name"),
        "",
        f"{good} of {len(parts)} parts passed; {tree['seconds']:.0f} s of {60 * tree['minutes_at_most']:.0f} s"
        + ("" if tree["complete"] else "; **not complete**: the check is still running, or was ended"),
        f"since {tree['started']}. Decoding was measured with {tree['model']}.",
        "",
        "## Claims",
        "",
        *_table(("claim", "wanted", "measured", "verdict"), (one.values() for one in tree["claims"])),
        "",
        "## Parts",
        "",
        *_table(("part", "state", "tests", "seconds", "limit"), (_part_row(name, one) for name, one in parts.items())),
        *_failures(parts),
        *_where_time_goes(tree["figures"]),
        *_before(tree["before"], machine),
    ]
    return "\n".join(lines) + "\n"


def _part_row(name: str, part: Mapping[str, Any]) -> tuple[object, ...]:
    passed = sum(test["state"] == PASSED for test in part["tests"])
    tests = f"{passed} of {len(part['tests'])}" if part["tests"] else "-"
    return name, part["state"], tests, f"{part['seconds']:.0f}", f"{part['limit']:.0f}"


def _failures(parts: Mapping[str, Any]) -> list[str]:
    """The tests that did not pass with the end of their tracebacks, and what parts that did not pass printed last."""
    lines: list[str] = []
    for name, part in parts.items():
        if part["state"] in (PASSED, NOT_RUN) and not part["output"]:
            continue
        lines += ["", f"### {name}: {part['state']}", ""]
        told = [test for test in part["tests"] if test["state"] != PASSED]
        lines += [f"- `{test['name']}`: {test['state']}" for test in told]
        texts = [test["message"].rstrip() for test in told if test["message"]] or ["\n".join(part["output"])]
        for text in filter(None, texts):
            lines += ["", "```text", text, "```"]
    return ["", "## What did not pass", *lines] if lines else []


def _where_time_goes(figures: Mapping[str, Any]) -> list[str]:
    """Tables of a training step's and a token's time."""
    lines: list[str] = []
    kinds = figures.get("training", {}).get("milliseconds_by_kind", {})
    if kinds:
        rows = ((kind, f"{spent:.2f}") for kind, spent in kinds.items())
        lines += ["", "## Where a training step's time goes", "", *_table(("kind", "ms"), rows)]
    modes = figures.get("decoding", {}).get("modes", {})
    parts = {mode: one["milliseconds_per_token"] for mode, one in modes.items() if "milliseconds_per_token" in one}
    if parts:
        names = list(next(iter(parts.values())))
        by_mode = ((mode, *(f"{one[name]:.3f}" for name in names)) for mode, one in parts.items())
        title = "## Where a token's time goes (ms, in a pass with timers)"
        lines += ["", title, "", *_table(("mode", *(name.replace("_", " ") for name in names)), by_mode)]
    batches = figures.get("serving", {}).get("batches", {})
    if batches:
        measured = (
            (batch, mode, f"{one['tokens_per_second']:.1f}", f"{one['tokens_per_full_call']:.2f}")
            for batch, by_mode in batches.items()
            for mode, one in by_mode.items()
        )
        headings = ("batch", "mode", "tokens/s", "tokens per full call")
        lines += ["", "## Decoding many sequences", "", *_table(headings, measured)]
    return lines


def _before(before: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    rows = [
        (one["figure"], f"{one['then']:,}", f"{one['now']:,.4g}", f"{one['now'] / one['then']:.2f}x")
        for one in before["figures"]
        if one["now"] is not None
    ]
    if not rows:
        return []
    other = "" if machine.get("name") == before["card"] else " It was another machine than this one."
    headings = ("figure", "then", "now", "now / then")
    return [
        *("", f"## Beside an earlier run on one {before['card']}", "", f"Source: {before['source']}.{other}", ""),
        *_table(headings, rows),
    ]


def _table(headings: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(headings), "|" + "---|" * len(headings), *map(line, rows)]
