"""Throughput of the engine by batch size and mode: tokens per second, acceptance, time to the first token.

Batches and modes are interleaved, in another order in every repeat, so that a slowdown of the machine affects all of
them. Each measurement decodes the same prompts: `batch` at once, refilled as they end, until each has
been decoded once. Speeds are medians over repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from recycle_ds.config.console import output_console
from recycle_ds.inference.bench.comparison import read_prompts
from recycle_ds.inference.bench.setting import host_threads
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.sequence import Sequence as Answer
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.loading import engine_of, load
from recycle_ds.inference.parameters import SamplingParams, check_mode
from recycle_ds.parallel.device import machine_name

# Fractional parts of its multiples are evenly spread over [0, 1).
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class ServingSettings:
    """batches: prompts decoded at once. Every measurement decodes at least one full batch. params: of all requests.

    Raises DecodingError for invalid values.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    modes: tuple[str, ...] = ("autoregressive", "verified")
    params: SamplingParams = field(default_factory=SamplingParams)
    repeats: int = 3

    def __post_init__(self) -> None:
        for mode in self.modes:
            check_mode(mode)
        if not self.batches or min(self.batches) < 1:
            raise DecodingError(
                f"batches={','.join(map(str, self.batches))}: give numbers of at least 1, such as 1,8,32"
            )
        if self.repeats < 1:
            raise DecodingError(f"repeats={self.repeats}: must be at least 1")
        if self.params.max_new_tokens < 2:
            raise DecodingError(
                f"max_new_tokens={self.params.max_new_tokens}: must be at least 2: speed is measured after the first token"
            )


@dataclass
class _Runs:
    """Measurements of one batch size and mode."""

    speeds: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    new_tokens: int = 0
    full_calls: int = 0
    tested: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def figures(self, first: _Runs) -> dict[str, Any]:
        """The report of this batch size and mode. first: those of the first mode, beside which each of these was run."""
        acceptance = [hits / trials for hits, trials in zip(self.accepted, self.tested, strict=True) if trials]
        return {
            "tokens_per_second": median(self.speeds),
            "factor": median(own / other for own, other in zip(self.speeds, first.speeds, strict=True)),
            "tokens_per_full_call": self.new_tokens / self.full_calls,
            "acceptance": acceptance,
            "time_to_first_token_p50": median(self.first_tokens),
        }


def measure(
    engine: DecodingEngine,
    prompts: Sequence[Sequence[int]],
    settings: ServingSettings,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The "batches" of the report: batch size, mode, figures. prompts: token ids; repeated if a batch needs more.

    Tokens per second are those of full batches: all new tokens from the moment in which the first requests have their
    first token until the last one has its own. They include the reading of all prompts added in between: until the last
    prompt is added, a mode whose sequences end together would read a batch of prompts less than others. Lengths vary from
    half of `max_new_tokens` to one and a half: requests of equal length end together, and only without drafts.
    """
    runs = {(batch, mode): _Runs() for batch in settings.batches for mode in settings.modes}
    most = engine.scheduler.max_batch
    engine.measure_costs()
    done, total = 0, settings.repeats * len(runs)
    try:
        if engine.first_runs is not None:  # what is new would be timed with what takes longer the first time
            for batch, mode in runs:
                engine.scheduler.max_batch = batch
                _run(engine, prompts, batch, mode, settings.params, _Runs())
        for repeat in range(settings.repeats):
            shift = repeat * len(settings.batches) // settings.repeats
            # modes one after the other, so that the machine is the same for all, every second time in reverse
            modes = settings.modes[:: -1 if repeat % 2 else 1]
            for batch in settings.batches[shift:] + settings.batches[:shift]:
                engine.scheduler.max_batch = batch
                for mode in modes:
                    _run(engine, prompts, batch, mode, settings.params, runs[batch, mode])
                    done += 1
                    on_progress(done, total)
    finally:
        engine.scheduler.max_batch = most
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for (batch, mode), one in runs.items():
        report.setdefault(str(batch), {})[mode] = one.figures(runs[batch, settings.modes[0]])
    return report


def _run(
    engine: DecodingEngine, prompts: Sequence[Sequence[int]], batch: int, mode: str, params: SamplingParams, runs: _Runs
) -> None:
    engine.scheduler.forget_prefixes()  # else a later run would find the prompts of an earlier one in the cache
    count = max(len(prompts), 3 * batch)
    left = [(prompts[index % len(prompts)], spread_length(index, params.max_new_tokens)) for index in range(count)]
    answers: list[Answer] = []
    clock = engine.scheduler.clock
    start: float | None = None
    tokens, counted, seconds = 0, 0, 0.0

    def total() -> int:
        return sum(len(one.tokens) - one.prompt_tokens for one in answers)

    while left or engine.unfinished:
        while left and sum(one.ended_at is None for one in answers) < batch:
            prompt, length = left.pop(0)
            answers += engine.add(prompt, replace(params, n=1, max_new_tokens=length), mode)
        refilling = bool(left) or any(one.first_token_at is None for one in answers)
        engine.step()
        if start is None and all(one.first_token_at is not None for one in answers):
            start, tokens = clock(), total()
        elif start is not None and refilling:
            seconds, counted = clock() - start, total() - tokens
    assert start is not None
    if not seconds:  # no refill: one batch from its first tokens to its end
        seconds, counted = clock() - start, total() - tokens
    runs.speeds.append(counted / seconds)
    for one in answers:
        assert one.first_token_at is not None
        runs.first_tokens.append(one.first_token_at - one.started)
        runs.new_tokens += len(one.tokens) - one.prompt_tokens
        runs.full_calls += one.full_calls
        for sums, counts in ((runs.tested, one.tally.tested), (runs.accepted, one.tally.accepted)):
            sums.extend([0] * (len(one.tally.tested) - len(sums)))
            for position, number in enumerate(counts):
                sums[position] += number


def spread_length(index: int, mean: int) -> int:
    """New tokens of a request: evenly spread between half of `mean` and one and a half, in a fixed order."""
    return max(2, mean // 2 + round(mean * (index * _GOLDEN % 1)))


def results_table(report: dict[str, Any]) -> Table:
    """The report as a table; the factor is the median of comparisons with the first mode at the same batch, run beside it."""
    table = Table(title=f"Serving {report['model']}  ({report['dtype']}, {report['machine']})", title_justify="left")
    for heading in ("batch", "mode", "tokens/s", "factor", "tokens per full call", "acceptance", "first token"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for batch, modes in report["batches"].items():
        for mode, figures in modes.items():
            table.add_row(
                batch,
                mode,
                f"{figures['tokens_per_second']:.1f}",
                f"{figures['factor']:.2f}x",
                f"{figures['tokens_per_full_call']:.2f}",
                " ".join(f"{value:.2f}" for value in figures["acceptance"][:4]) or "-",
                f"{1000 * figures['time_to_first_token_p50']:.0f} ms",
            )
    return table


def bench_serving(
    path: str, prompts: Path, settings: ServingSettings, *, dtype: str, threads: int | None, kv_memory_gib: float | None
) -> dict[str, Any]:
    """`measure` for a model folder and a file of prompts, with a progress bar on stderr if that is a terminal."""
    texts = read_prompts(prompts)
    loaded = load(path, dtype, threads)
    engine = engine_of(loaded, max(settings.batches), kv_memory_gib)
    columns = (TextColumn("serving"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = output_console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("serving", total=None)
        batches = measure(
            engine,
            [loaded.tokenizer.encode(text) for text in texts],
            settings,
            lambda done, of: progress.update(task, completed=done, total=of),
        )
    device = next(loaded.model.parameters()).device
    return {
        "batches": batches,
        "model": path,
        "dtype": dtype,
        "threads": host_threads(device),
        "machine": machine_name(device),
    }
