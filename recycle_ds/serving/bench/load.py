"""Times and throughput of a server by number of clients and mode.

Every client sends its next request when it has the answer to the one before (a closed loop), and all send the same requests
in the same order. Numbers of clients and modes are interleaved, and their order rotates from repeat to repeat, so that a
slowdown of the machine affects all of them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from recycle_ds.inference.bench.serving import spread_length
from recycle_ds.inference.parameters import check_mode
from recycle_ds.serving.bench.client import Client, Target, Timed
from recycle_ds.serving.process.errors import ServingError

_WARMUP_TOKENS = 8


@dataclass(frozen=True)
class LoadSettings:
    """max_new_tokens: on average; answers are limited to between half of it and one and a half, as requests of equal length
    would end together in one mode only. fields: further fields of every request. Raises RecycleError for invalid values."""

    clients: tuple[int, ...] = (1, 8, 32)
    modes: tuple[str, ...] = ("autoregressive", "verified")
    max_new_tokens: int = 64
    repeats: int = 2
    requests: int | None = None
    """Of one measurement; by default every prompt once, and two for every client."""
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mode in self.modes:
            check_mode(mode)
        if not self.clients or min(self.clients) < 1:
            given = ",".join(map(str, self.clients))
            raise ServingError(f"clients={given}: give numbers of at least 1, such as 1,8,32")
        for name, value, least in (
            ("max_new_tokens", self.max_new_tokens, 2),
            ("repeats", self.repeats, 1),
            ("requests", 1 if self.requests is None else self.requests, 1),
        ):
            if value < least:
                raise ServingError(f"{name}={value}: must be at least {least}")


@dataclass
class _Runs:
    """Measurements of one number of clients and one mode."""

    speeds: list[float] = field(default_factory=list)
    answers: list[Timed] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """The report of it."""
        recycle = [one.usage["recycle"] for one in self.answers]
        tested, accepted = (_summed(one[name] for one in recycle) for name in ("drafts_verified", "drafts_accepted"))
        tokens = sum(one.new_tokens for one in self.answers)
        prompts = sum(one.usage["prompt_tokens"] for one in self.answers)
        cached = sum(one.usage["prompt_tokens_details"]["cached_tokens"] for one in self.answers)
        return {
            "tokens_per_second": median(self.speeds),
            "time_to_first_token": _percentiles([one.first for one in self.answers]),
            "time_per_output_token": _percentiles([one.per_token for one in self.answers if one.per_token is not None]),
            "tokens_per_full_call": tokens / sum(one["full_calls"] for one in recycle),
            "acceptance": [hits / trials for hits, trials in zip(accepted, tested, strict=True) if trials],
            "requests": len(self.answers),
            "new_tokens": tokens,
            "cached_prompt_share": cached / prompts,
        }


def measure(
    target: Target,
    prompts: Sequence[str],
    settings: LoadSettings,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The "clients" of the report: number of clients, mode, figures.

    tokens_per_second: all new tokens over the time from the first request to the last answer; median over repeats. Times are
    in seconds, of all requests of all repeats. time_per_output_token: of a request, its mean after the first token. All
    prompts are sent once before, so that what the server finds in its cache is alike in all measurements:
    cached_prompt_share says how much that is. Raises ServingError if a request fails.
    """
    runs = {(clients, mode): _Runs() for clients in settings.clients for mode in settings.modes}
    order, done = list(runs), 0
    total = len(settings.modes) + settings.repeats * len(order)
    for mode in settings.modes:
        jobs = [(prompt, min(settings.max_new_tokens, _WARMUP_TOKENS)) for prompt in prompts]
        _run(target, jobs, max(settings.clients), mode, settings.fields, _Runs())
        on_progress(done := done + 1, total)
    for repeat in range(settings.repeats):
        shift = repeat * len(order) // settings.repeats
        for clients, mode in order[shift:] + order[:shift]:
            count = settings.requests or max(len(prompts), 2 * clients)
            jobs = [(prompts[i % len(prompts)], spread_length(i, settings.max_new_tokens)) for i in range(count)]
            _run(target, jobs, clients, mode, settings.fields, runs[clients, mode])
            on_progress(done := done + 1, total)
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for (clients, mode), one in runs.items():
        report.setdefault(str(clients), {})[mode] = one.figures()
    return report


def _run(
    target: Target, jobs: Sequence[tuple[str, int]], clients: int, mode: str, fields: dict[str, Any], runs: _Runs
) -> None:
    """Lets clients do all jobs (prompt, new tokens). The first error ends all clients after their request."""
    left, lock, errors = iter(jobs), threading.Lock(), list[Exception]()
    answers: list[Timed] = []

    def work() -> None:
        client = Client(target)
        try:
            while not errors:
                with lock:
                    job = next(left, None)
                if job is None:
                    return
                answers.append(client.complete(job[0], mode, job[1], fields))
        except Exception as error:
            errors.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(clients, len(jobs)))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    runs.answers += answers
    runs.speeds.append(sum(one.new_tokens for one in answers) / seconds)


def _percentiles(values: list[float]) -> dict[str, float] | None:
    """The smallest value that at least so many per cent do not exceed; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] for share in (50, 99)}


def _summed(rows: Any) -> list[int]:
    total: list[int] = []
    for row in rows:
        total += [0] * (len(row) - len(total))
        for position, value in enumerate(row):
            total[position] += value
    return total
