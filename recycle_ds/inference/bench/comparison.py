"""Compares decoding modes on the same prompts: the figures of `decoding.json`, a table, and notes that explain them.

Prompts and modes are interleaved, and the order of the modes rotates from prompt to prompt, so that a slowdown of the
machine affects all modes. Speeds are medians over repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.config.console import output_console
from recycle_ds.inference.batch.prompts import read_prompt_file
from recycle_ds.inference.bench.diagnosis import notes_on_verified
from recycle_ds.inference.decoder import Decoder
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import Generation
from recycle_ds.inference.loading import decoder_of, load
from recycle_ds.inference.parameters import check_mode
from recycle_ds.parallel.device import machine_name

REFERENCE = "autoregressive"
_WARMUP_TOKENS = 32


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a comparison. `autoregressive` is always run, and first in the report: it is the reference for speedup
    and identity.

    draft_tokens: None means each mode's default. Raises DecodingError for invalid values.
    """

    modes: tuple[str, ...] = (REFERENCE, "alternate", "verified")
    max_new_tokens: int = 128
    draft_tokens: int | None = None
    repeats: int = 3

    def __post_init__(self) -> None:
        for mode in self.modes:
            check_mode(mode)
        if self.max_new_tokens < 2:
            raise DecodingError(
                f"max_new_tokens={self.max_new_tokens}: must be at least 2, because speed is measured after the first token"
            )
        if self.repeats < 1:
            raise DecodingError(f"repeats={self.repeats}: must be at least 1")
        others = tuple(mode for mode in dict.fromkeys(self.modes) if mode != REFERENCE)
        object.__setattr__(self, "modes", (REFERENCE, *others))


@dataclass(frozen=True)
class BenchResult:
    """The content of decoding.json, and notes that explain it."""

    report: dict[str, Any]
    notes: list[str]


@dataclass
class _Runs:
    """One mode's generations: [repeat][prompt]."""

    repeats: list[list[Generation]] = field(default_factory=list)

    @property
    def first(self) -> list[Generation]:
        return self.repeats[0]

    def tokens_per_second(self) -> float:
        """Median over repeats of all tokens after the first over all seconds of decoding."""
        speeds = []
        for generations in self.repeats:
            tokens = sum(len(one.token_ids) - 1 for one in generations)
            seconds = sum(one.decode_seconds for one in generations)
            speeds.append(tokens / seconds if tokens else 0.0)
        return median(speeds)

    def tokens_per_full_call(self) -> float:
        everything = [one for generations in self.repeats for one in generations]
        return sum(len(one.token_ids) for one in everything) / sum(one.full_calls for one in everything)

    def acceptance(self) -> list[float]:
        """By draft position, over all prompts and repeats."""
        everything = [one for generations in self.repeats for one in generations]
        positions = max((len(one.tested) for one in everything), default=0)
        tested = [sum(one.tested[i] for one in everything if i < len(one.tested)) for i in range(positions)]
        accepted = [sum(one.accepted[i] for one in everything if i < len(one.accepted)) for i in range(positions)]
        return [hits / trials for hits, trials in zip(accepted, tested, strict=True) if trials]


def read_prompts(path: Path) -> list[str]:
    """The "prompt" of each line of a .jsonl file. Raises DecodingError naming file and line."""
    return [record["prompt"] for record in read_prompt_file(path)]


def run_bench(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: BenchSettings,
    *,
    model: str,
    dtype: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Decodes every prompt (token ids) in every mode, greedily, `settings.repeats` times.

    model, dtype: recorded in the report as given. on_progress: called with the numbers of completed and of all
    generations.
    """
    runs = {mode: _Runs() for mode in settings.modes}
    for mode in settings.modes:
        decoder.generate(
            prompts[0],
            mode,
            max_new_tokens=min(settings.max_new_tokens, _WARMUP_TOKENS),
            draft_tokens=settings.draft_tokens,
        )
    total = settings.repeats * len(prompts) * len(settings.modes)
    done = 0
    for repeat in range(settings.repeats):
        for one in runs.values():
            one.repeats.append([])
        for index, prompt in enumerate(prompts):
            for mode in _rotated(settings.modes, repeat + index):
                generation = decoder.generate(
                    prompt, mode, max_new_tokens=settings.max_new_tokens, draft_tokens=settings.draft_tokens
                )
                runs[mode].repeats[-1].append(generation)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
    report: dict[str, Any] = {
        "modes": _figures(runs),
        "model": model,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "machine": machine_name(next(decoder.model.parameters()).device),
    }
    notes: list[str] = []
    if "verified" in runs:
        notes = notes_on_verified(
            decoder,
            prompts,
            settings.draft_tokens,
            [one.token_ids for one in runs[REFERENCE].first],
            [[one.token_ids for one in generations] for generations in runs["verified"].repeats],
            report["modes"]["verified"],
        )
    return BenchResult(report, notes)


def bench_model(path: str, prompts: Path, settings: BenchSettings, *, dtype: str, threads: int | None) -> BenchResult:
    """`run_bench` for a model folder and a file of prompts, with a progress bar on stderr if that is a terminal."""
    texts = read_prompts(prompts)
    loaded = load(path, dtype, threads)
    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = output_console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("decoding", total=None)
        return run_bench(
            decoder_of(loaded),
            [loaded.tokenizer.encode(text) for text in texts],
            settings,
            model=path,
            dtype=dtype,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def print_result(result: BenchResult) -> None:
    """Prints the table, followed by the notes, to stdout."""
    console = output_console()
    console.print(results_table(result.report))
    for note in result.notes:
        console.print(note, soft_wrap=True, highlight=False)


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes decoding.json atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, report)


def results_table(report: dict[str, Any]) -> Table:
    """The report as a table."""
    table = Table(
        title=f"Decoding {report['model']}  ({report['dtype']}, {report['threads']} threads, {report['machine']})",
        title_justify="left",
    )
    for heading in ("mode", "tokens/s", "speedup", "tokens per full call", "acceptance by position", "identical"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for mode, figures in report["modes"].items():
        table.add_row(
            mode,
            f"{figures['tokens_per_second']:.1f}",
            f"{figures['speedup']:.2f}x",
            f"{figures['tokens_per_full_call']:.2f}",
            " ".join(f"{value:.2f}" for value in figures["acceptance"]) or "-",
            "yes" if figures["identical_to_autoregressive"] else "no",
        )
    return table


def _rotated(modes: tuple[str, ...], by: int) -> tuple[str, ...]:
    by %= len(modes)
    return modes[by:] + modes[:by]


def _figures(runs: dict[str, _Runs]) -> dict[str, dict[str, Any]]:
    """The "modes" of the report. Raises DecodingError if there was nothing to time."""
    reference = runs[REFERENCE]
    base = reference.tokens_per_second()
    if base == 0:
        raise DecodingError("no prompt was continued by more than one token: nothing to time; use other prompts")
    expected = [one.token_ids for one in reference.first]
    figures = {}
    for mode, one in runs.items():
        speed = one.tokens_per_second()
        figures[mode] = {
            "tokens_per_second": speed,
            "speedup": speed / base,
            "tokens_per_full_call": one.tokens_per_full_call(),
            "acceptance": one.acceptance(),
            "identical_to_autoregressive": all(
                [generation.token_ids for generation in generations] == expected for generations in one.repeats
            ),
            "prompts": len(one.first),
            "new_tokens": sum(len(generation.token_ids) for generation in one.first),
        }
    return figures
