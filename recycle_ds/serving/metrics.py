"""Prometheus metrics of one application. Nothing is registered globally: several applications can run in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from recycle_ds.serving.answers.usage import Usage
from recycle_ds.serving.state import State

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PER_CALL = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8)
_LENGTHS = (16, 64, 256, 1024, 4096, 16384, 65536)
_MAX_POSITION = 16  # further draft positions are counted with this one


class Metrics:
    """Metrics of requests, observed when they end, and of the engine, read when they are asked for."""

    def __init__(self, state: State, running: Callable[[], int], max_requests: int) -> None:
        """running: requests with a body at this moment, of at most max_requests."""
        self._registry = registry = CollectorRegistry()

        def by_mode(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["mode"], registry=registry, buckets=buckets)

        self.requests = Counter(
            "recycle_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        now = Gauge("recycle_requests_running", "Requests with a body that are being answered.", registry=registry)
        now.set_function(running)
        most = Gauge("recycle_request_limit", "Requests that can be answered at once.", registry=registry)
        most.set(max_requests)
        self.disconnects = Counter(
            "recycle_disconnects", "Requests whose client went away, or read too slowly.", registry=registry
        )
        self._first = by_mode("recycle_time_to_first_token_seconds", "From a request to its first token.", _FIRST)
        self._token = by_mode(
            "recycle_time_per_output_token_seconds", "Mean time per token of a request after its first one.", _TOKEN
        )
        self._request = by_mode("recycle_request_seconds", "From a request to its last token.", _REQUEST)
        self._per_call = by_mode(
            "recycle_tokens_per_full_call", "New tokens per call of the full model, by answer.", _PER_CALL
        )
        self._prompt = by_mode("recycle_prompt_length_tokens", "Tokens of prompts.", _LENGTHS)
        self._prompt_tokens = Counter("recycle_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached_tokens = Counter(
            "recycle_cached_prompt_tokens", "Tokens of prompts that were found in the KV cache.", registry=registry
        )
        self._new_tokens = Counter(
            "recycle_completion_tokens", "New tokens by source.", ["mode", "source"], registry=registry
        )
        self._tested = Counter(
            "recycle_drafts_verified", "Drafts verified, by position.", ["position"], registry=registry
        )
        self._accepted = Counter(
            "recycle_drafts_accepted", "Drafts accepted, by position.", ["position"], registry=registry
        )
        registry.register(_EngineCollector(state))

    def observe(self, usage: Usage, now: float) -> None:
        """Counts a request that has ended, complete or not."""
        mode = usage.mode
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._cached_tokens.inc(usage.cached_tokens)
        self._prompt.labels(mode).observe(usage.prompt_tokens)
        self._new_tokens.labels(mode, "recycled").inc(usage.recycled)
        self._new_tokens.labels(mode, "full").inc(usage.completion_tokens - usage.recycled)
        if usage.first_token is not None and usage.latest_token is not None:
            self._first.labels(mode).observe(usage.first_token - usage.started)
            if usage.completion_tokens > 1:
                seconds = usage.latest_token - usage.first_token
                self._token.labels(mode).observe(seconds / (usage.completion_tokens - 1))
        if usage.finished:
            self._request.labels(mode).observe(now - usage.started)
        for generation in usage.finished:
            self._per_call.labels(mode).observe(generation.tokens_per_full_call)
        for counter, counts in ((self._tested, usage.tested), (self._accepted, usage.accepted)):
            for position, count in enumerate(counts, start=1):
                counter.labels(str(min(position, _MAX_POSITION))).inc(count)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the worker's statistics at every scrape."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yields all metrics of the engine; before the model is loaded, only whether it is."""
        state = self._state
        yield GaugeMetricFamily("recycle_ready", "Whether new requests are taken.", value=float(state.ready))
        yield GaugeMetricFamily("recycle_draining", "Whether the server is shutting down.", value=float(state.draining))
        if state.model is None:
            return
        now = state.model.worker.statistics()
        gauges: dict[str, tuple[str, float]] = {
            "recycle_answers_running": ("Answers that are being decoded.", now.running),
            "recycle_answers_waiting": ("Answers in the queue.", now.waiting),
            "recycle_batch_limit": ("Answers that can be decoded at once.", now.max_batch),
            "recycle_queue_limit": ("Answers that may wait.", now.max_queued),
            "recycle_kv_blocks_used": ("Blocks of the KV cache in use.", now.blocks_used),
            "recycle_kv_blocks": ("Blocks of the KV cache.", now.blocks_total),
        }
        budget = now.budget
        if budget is not None:
            gauges |= {
                "recycle_draft_budget_sequences": ("Sequences in the latest decision.", budget.sequences),
                "recycle_draft_budget_drafts": ("Drafts that could be verified in the latest step.", budget.drafts),
                "recycle_draft_budget_verified": ("Drafts verified in the latest step.", budget.verified),
                "recycle_draft_budget_next": ("Most drafts that a sequence makes next.", budget.made_next),
                "recycle_draft_budget_expected_tokens": ("Expected tokens of the latest step.", budget.expected_tokens),
                "recycle_full_call_seconds": ("Predicted time of the latest full call.", budget.full_call_seconds),
                "recycle_first_draft_seconds": (
                    "Predicted time of the first draft of every sequence.",
                    budget.first_draft_seconds,
                ),
                "recycle_further_draft_seconds": (
                    "Predicted time of a further draft of every sequence.",
                    budget.further_draft_seconds,
                ),
            }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=float(value))
        counters: dict[str, tuple[str, float]] = {
            "recycle_preemptions": ("Answers whose memory was taken for others.", now.preemptions),
            "recycle_prefix_hit_tokens": ("Positions of prompts found in the KV cache.", now.reused_tokens),
            "recycle_steps": ("Steps of the engine.", now.steps),
            "recycle_decoded_tokens": ("New tokens of all answers.", now.new_tokens),
            "recycle_answers_finished": ("Complete answers.", now.finished),
            "recycle_answers_cancelled": ("Answers that were cancelled.", now.cancelled),
            "recycle_answers_failed": ("Answers that an error ended.", now.failed),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=float(value))
        tested = CounterMetricFamily(
            "recycle_context_drafts_verified", "Drafts verified, by context length.", labels=["up_to"]
        )
        accepted = CounterMetricFamily(
            "recycle_context_drafts_accepted", "Drafts accepted, by context length.", labels=["up_to"]
        )
        for bound, verified, kept in now.acceptance_by_context:
            label = [str(bound) if bound else "+Inf"]
            tested.add_metric(label, float(verified))
            accepted.add_metric(label, float(kept))
        yield tested
        yield accepted
