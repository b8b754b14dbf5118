"""Compares decoding modes, and other programs, on the same prompts: the figures of `decoding.json` and notes that explain them.

Prompts, modes and peers are interleaved, and their order rotates from prompt to prompt, so that a slowdown of the
machine affects all of them. Speeds are medians over repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.config.console import output_console
from recycle_ds.inference.batch.prompts import read_prompt_file
from recycle_ds.inference.bench.bench_prompts import BenchPrompt, numbers_by_kind, read_bench_prompts
from recycle_ds.inference.bench.diagnosis import first_divergences, notes_on_verified
from recycle_ds.inference.bench.parts import time_by_part
from recycle_ds.inference.bench.peers import OpenPeers, Peer, PeerRequest, Task, check_peers, open_peers
from recycle_ds.inference.bench.quality import quality
from recycle_ds.inference.bench.runs import Runs, Timed, run_interleaved
from recycle_ds.inference.bench.setting import host_threads
from recycle_ds.inference.decoder import Decoder, decode_one
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.loading import decoder_of, load
from recycle_ds.inference.parameters import SEED_LIMIT, SamplingParams, check_mode
from recycle_ds.parallel.device import machine_name

REFERENCE = "autoregressive"
_WARMUP_TOKENS = 32
_PROFILED = 8
"""Prompts that are decoded again to measure the time by part."""


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a comparison. `autoregressive` is always run, and first in the report: it is the reference for speedup
    and identity.

    draft_tokens: None means each mode's default. temperature: 0 takes the most likely token; above 0, modes are compared
    token by token only with a seed. details: whether the report also has figures by kind of prompt, the time by part of a
    step, the quality of a lossy mode and where texts differ. Raises DecodingError for invalid values.
    """

    modes: tuple[str, ...] = (REFERENCE, "alternate", "verified")
    max_new_tokens: int = 128
    draft_tokens: int | None = None
    repeats: int = 3
    temperature: float = 0.0
    seed: int | None = None
    details: bool = False

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
        self.params(0)

    def params(self, number: int) -> SamplingParams:
        """The parameters of prompt `number`."""
        seed = None if self.seed is None or not self.temperature else (self.seed + number) % SEED_LIMIT
        return SamplingParams(
            temperature=self.temperature,
            seed=seed,
            max_new_tokens=self.max_new_tokens,
            draft_tokens=self.draft_tokens,
        )

    @property
    def comparable(self) -> bool:
        """Whether all modes are to give the same tokens. Without a seed, each samples a text of its own."""
        return not self.temperature or self.seed is not None


@dataclass(frozen=True)
class BenchResult:
    """The content of decoding.json, and notes that explain it."""

    report: dict[str, Any]
    notes: list[str]


def read_prompts(path: Path) -> list[str]:
    """The "prompt" of each line of a .jsonl file. Raises DecodingError naming file and line."""
    return [record["prompt"] for record in read_prompt_file(path)]


def run_bench(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | BenchPrompt],
    settings: BenchSettings,
    *,
    model: str,
    dtype: str,
    peers: OpenPeers | None = None,
    end_ids: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Decodes every prompt in every mode and with every peer, `settings.repeats` times.

    prompts: token ids, with or without a kind. model, dtype: recorded in the report as given. end_ids: tokens at which
    peers end a text, as the decoder does. on_progress: called with the numbers of completed and of all texts.
    """
    asked = [one if isinstance(one, BenchPrompt) else BenchPrompt(list(one)) for one in prompts]
    opened = peers or OpenPeers()
    progress = on_progress or (lambda done, total: None)
    runs, first_runs = _run_all(decoder, asked, settings, opened.peers, tuple(end_ids), progress)
    ids = [one.ids for one in asked]
    device = next(decoder.model.parameters()).device
    report: dict[str, Any] = {
        "modes": {mode: _figures(runs[mode], runs[REFERENCE], settings) for mode in settings.modes},
        "model": model,
        "dtype": dtype,
        "threads": host_threads(device),
        "machine": machine_name(device),
    }
    notes = list(opened.notes)
    if first_runs:
        report["first_runs_while_timed"] = first_runs
        notes.append(f"{first_runs} CUDA graphs were captured while modes were timed: their speeds are too low by that")
    if "verified" in runs:
        expected = [one.token_ids for one in runs[REFERENCE].first]
        found = [] if settings.temperature else runs["verified"].token_ids  # sampled texts have no gap to report
        notes += notes_on_verified(decoder, ids, settings.draft_tokens, expected, found, report["modes"]["verified"])
    if opened.peers:
        report["peers"] = {
            one.name: _speeds(runs[one.name], runs[REFERENCE], not settings.temperature) | one.details
            for one in opened.peers
        }
    if settings.details:
        _add_details(report, runs, decoder, asked, settings)
    return BenchResult(report, notes)


def _run_all(
    decoder: Decoder,
    prompts: Sequence[BenchPrompt],
    settings: BenchSettings,
    peers: Sequence[Peer],
    end_ids: tuple[int, ...],
    on_progress: Callable[[int, int], None],
) -> tuple[dict[str, Runs], int]:
    """All texts, by mode or peer, and how many shapes of steps were new while they were timed."""

    def own(mode: str, number: int, most: int) -> Timed:
        params = replace(settings.params(number), max_new_tokens=most)
        return Timed.of(decode_one(decoder.engine, prompts[number].ids, params, mode))

    def of_peer(peer: Peer, number: int, most: int) -> Timed:
        seed = settings.params(number).seed
        most = min(most, decoder.model.max_positions - len(prompts[number].ids))  # where our own texts end
        return peer.generate(prompts[number].ids, Task(most, end_ids, settings.temperature, seed))

    contenders: dict[str, Callable[..., Timed]] = {mode: partial(own, mode) for mode in settings.modes}
    contenders |= {peer.name: partial(of_peer, peer) for peer in peers}
    for decode in contenders.values():  # the first text of each pays for allocations and measurements
        decode(0, min(settings.max_new_tokens, _WARMUP_TOKENS))
    if decoder.engine.first_runs is not None:  # and later ones for every shape of a step that is new
        for mode in settings.modes:
            for number in range(len(prompts)):
                own(mode, number, settings.max_new_tokens)
    known = decoder.engine.first_runs or 0
    timed = {name: partial(decode, most=settings.max_new_tokens) for name, decode in contenders.items()}
    runs = run_interleaved(timed, len(prompts), settings.repeats, on_progress)
    return runs, (decoder.engine.first_runs or 0) - known


def _speeds(one: Runs, reference: Runs, comparable: bool) -> dict[str, Any]:
    """What the report has of modes and peers alike. comparable: whether they are to give the same tokens. Raises DecodingError
    if there was nothing to time."""
    base = reference.tokens_per_second()
    if base == 0:
        raise DecodingError("no prompt was continued by more than one token: nothing to time; use other prompts")
    speed = one.tokens_per_second()
    expected = [text.token_ids for text in reference.first]
    same = all(texts == expected for texts in one.token_ids)
    return {
        "tokens_per_second": speed,
        "speedup": speed / base,
        "identical_to_autoregressive": same if comparable else None,
        "prompts": len(one.first),
        "new_tokens": sum(len(text.token_ids) for text in one.first),
    }


def _figures(one: Runs, reference: Runs, settings: BenchSettings) -> dict[str, Any]:
    """What the report has of a mode."""
    figures = _speeds(one, reference, settings.comparable)
    return figures | {"tokens_per_full_call": one.tokens_per_full_call(), "acceptance": one.acceptance()}


def _add_details(
    report: dict[str, Any],
    runs: Mapping[str, Runs],
    decoder: Decoder,
    prompts: Sequence[BenchPrompt],
    settings: BenchSettings,
) -> None:
    """Adds what `BenchSettings.details` promises."""
    report["settings"] = {
        name: getattr(settings, name) for name in ("max_new_tokens", "draft_tokens", "repeats", "temperature", "seed")
    }
    kinds, ids = numbers_by_kind(prompts), [one.ids for one in prompts]
    reference = runs[REFERENCE]
    expected = [text.token_ids for text in reference.first]
    for name, figures in (*report["modes"].items(), *report.get("peers", {}).items()):
        one, is_mode = runs[name], name in report["modes"]
        figures["kinds"] = {kind: _of_kind(one, reference, among, is_mode) for kind, among in kinds.items()}
        if name == "verified" and not settings.temperature:
            figures["divergences"] = first_divergences(decoder.model, ids, expected, one.token_ids)
    if "alternate" in runs:
        found = [text.token_ids for text in runs["alternate"].first]
        measured = quality(decoder.model, ids, expected, found)
        if not settings.comparable:  # two texts drawn at random differ whatever the mode
            measured = {key: value for key, value in measured.items() if key.startswith("log_likelihood")}
        report["modes"]["alternate"]["quality"] = measured
    step = max(len(ids) // _PROFILED, 1)  # spread over the file, and so over kinds
    for mode in settings.modes:
        found_parts = time_by_part(decoder.engine, ids[::step][:_PROFILED], mode, settings.params(0))
        report["modes"][mode]["milliseconds_per_token"] = found_parts


def _of_kind(one: Runs, reference: Runs, among: Sequence[int], is_mode: bool) -> dict[str, Any]:
    """Figures of one kind of prompt; speedup: over `autoregressive` on the same prompts, None if it wrote nothing to time."""
    speed, base = one.tokens_per_second(among), reference.tokens_per_second(among)
    figures: dict[str, Any] = {
        "tokens_per_second": speed,
        "speedup": speed / base if base else None,
        "prompts": len(among),
    }
    if is_mode:
        figures |= {"tokens_per_full_call": one.tokens_per_full_call(among), "acceptance": one.acceptance(among)}
    return figures


def bench_model(
    path: str,
    prompts: Path | None,
    settings: BenchSettings,
    *,
    dtype: str,
    threads: int | None,
    template: bool | None = None,
    per_kind: int | None = None,
    peers: PeerRequest | None = None,
) -> BenchResult:
    """`run_bench` for a model folder and a file of prompts, with a progress bar on stderr if that is a terminal.

    prompts, template, per_kind: see `read_bench_prompts`.
    """
    request = peers or PeerRequest()
    check_peers(request, Path(path))
    loaded = load(path, dtype, threads)
    asked = read_bench_prompts(prompts, loaded.tokenizer, template=template, per_kind=per_kind)
    longest = max(len(one.ids) for one in asked)
    context = min(longest + settings.max_new_tokens, loaded.model.max_positions)
    opened = open_peers(request, Path(path), dtype, torch.get_num_threads(), context)
    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = output_console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("decoding", total=None)
        try:
            return run_bench(
                decoder_of(loaded),
                asked,
                settings,
                model=path,
                dtype=dtype,
                peers=opened,
                end_ids=tuple(loaded.tokenizer.end_ids),
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        finally:
            opened.close()


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes decoding.json atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, report)
