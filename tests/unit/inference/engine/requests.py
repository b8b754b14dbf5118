"""Random requests with every parameter, and what a single stream without drafts answers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from recycle_ds.inference import Decoder, Generation
from recycle_ds.inference.engine.build import BLOCK_SIZE
from recycle_ds.inference.engine.cache import Cache
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.plan import Plan
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.parameters import MODES, SamplingParams
from recycle_ds.inference.speculation.budget import DraftBudget
from recycle_ds.inference.speculation.cost_model import CostModel
from recycle_ds.model import RecycleGPT
from tests.unit.inference.models import Letters

PREFIXES = ([1, 2, 3, 1, 2, 0, 1, 2, 4, 1, 1, 2, 3, 0, 2, 2, 1, 0], [2, 2, 0, 1] * 9)
"""Many prompts begin with one of these: their blocks are shared."""


@dataclass(frozen=True)
class Asked:
    """A request. arrival: steps after the previous one. cancelled_after: tokens after which it is cancelled."""

    prompt: list[int]
    params: SamplingParams
    mode: str
    priority: int
    arrival: int
    cancelled_after: int | None = None


def requests(count: int, vocabulary: int, seed: int, modes: tuple[str, ...] = MODES) -> list[Asked]:
    """Random requests: lengths, parameters, priorities, arrival, cancellation. `alternate` ones are deterministic too."""
    draw, more = random.Random(seed), random.Random(seed + 1_000_000)
    found = []
    for _ in range(count):
        mode = draw.choice([mode for mode in modes if mode != "alternate" or draw.random() < 0.3] or ["verified"])
        prefix = draw.choice([[], [], *PREFIXES])
        prompt = [*prefix, *(draw.randrange(min(vocabulary, 5)) for _ in range(draw.randint(1, 20)))]
        params = SamplingParams(max_new_tokens=draw.randint(1, 40), draft_tokens=draw.choice([None, 0, 1, 3, 3, 7]))
        if mode == "alternate":
            params = replace(params, draft_tokens=draw.choice([1, 2]))
        if draw.random() < 0.5:
            params = replace(params, temperature=draw.choice([0.6, 1.0, 1.4]), seed=draw.randrange(1000))
            params = replace(
                params, top_k=draw.choice([0, 0, 4]), top_p=draw.choice([1.0, 0.8]), min_p=draw.choice([0, 0.05])
            )
        if draw.random() < 0.3:
            params = replace(
                params, repetition_penalty=draw.choice([1.3, 0.8]), presence_penalty=draw.choice([0.0, 0.5])
            )
        if draw.random() < 0.2:
            params = replace(
                params, frequency_penalty=0.3, logit_bias={draw.randrange(vocabulary): draw.uniform(-2, 2)}
            )
        if draw.random() < 0.2:
            params = replace(
                params, bad_tokens=(draw.randrange(vocabulary),), min_new_tokens=min(4, params.max_new_tokens)
            )
        if draw.random() < 0.3:
            params = replace(params, stop_tokens=(draw.randrange(vocabulary),), ignore_eos=draw.random() < 0.5)
        if mode != "alternate" and draw.random() < 0.2:
            params = replace(params, logprobs=2, prompt_logprobs=len(prompt) % 2 == 0)
        if more.random() < 0.15:
            allowed = {*more.sample(range(vocabulary), vocabulary // 2)} - {*params.bad_tokens}
            params = replace(params, allowed_tokens=tuple(sorted(allowed)))
        if more.random() < 0.1:
            params = replace(params, max_new_tokens=80)  # more than the context has room for behind most prompts
        cancelled = draw.randint(0, 6) if draw.random() < 0.12 else None
        found.append(Asked(prompt, params, mode, draw.choice([0, 0, 0, 1, 5]), draw.choice([0, 0, 0, 1, 3]), cancelled))
    return found


def with_texts(asked: Sequence[Asked], seed: int) -> list[Asked]:
    """The same requests, of which some ask for several answers, and some end at stop strings: engines need `Letters`."""
    draw = random.Random(seed)
    found = []
    for one in asked:
        stop = tuple("".join(draw.choices("abcdef", k=draw.choice([1, 2, 2]))) for _ in range(2))
        params = replace(one.params, stop=stop) if draw.random() < 0.25 else one.params
        found.append(replace(one, params=replace(params, n=draw.choice([1, 1, 1, 2, 3]))))
    return found


class FixedCosts(CostModel):
    """Costs that do not follow the machine: how many drafts are made does not depend on how busy it is."""

    def correct(self, *step: float) -> None:
        """Ignores what a step took."""


class AlwaysDrafts(DraftBudget):
    """A budget that makes deep trees however few drafts are accepted."""

    def _best_depths(self, items: Sequence[tuple[float, int, int]], tokens: int, drafting: int) -> tuple[int, float]:
        return len(items), 1.0


def free_drafts(engine: DecodingEngine) -> DecodingEngine:
    """An engine that always drafts, and verifies many nodes of every tree: by its costs they take no time."""
    engine.scheduler.budget = AlwaysDrafts()
    engine.use_costs(FixedCosts(((1, 1.0), (1000, 1.001)), ((1, 1e-4),)))
    return engine


def moves_of(engine: DecodingEngine) -> list[int]:
    """A list to which every step from now on appends how many accepted drafts it moved to their positions."""
    submit, found = engine._executor.submit, []

    def counting(plan: Plan) -> None:
        found.append(len(plan.moves))
        submit(plan)

    engine._executor.submit = counting  # type: ignore[method-assign]
    return found


def memory_of(model: RecycleGPT, blocks: int) -> float:
    """GiB of KV cache, on this rank of a model, with room for exactly so many blocks."""
    return (blocks + 0.5) * Cache.bytes_per_block(StageWeights(model), BLOCK_SIZE) / 2**30


def decode_alone(model: RecycleGPT, asked: list[Asked], eos: int | None = None) -> list[Generation]:
    """The answers of a single stream, each of a request of its own: without drafts, but for `alternate`, whose text depends on
    them."""
    answers = []
    for one in asked:
        mode = one.mode if one.mode == "alternate" else "autoregressive"
        for index in range(one.params.n):
            seed = None if one.params.seed is None else one.params.seed + index
            params = replace(one.params, n=1, seed=seed, prompt_logprobs=one.params.prompt_logprobs and index == 0)
            decoder = Decoder(model, eos, Letters)
            (sequence,) = decoder.engine.add(one.prompt, params, mode)
            decoder.engine.finish([sequence])
            answers.append(sequence.generation(0.0))
    return answers


def decode_together(engine: DecodingEngine, asked: list[Asked]) -> list[Generation]:
    """Adds requests while others are decoded, and cancels some. Checks the scheduler's books after every step. Returns all
    answers, those of a request one after the other."""
    left = list(asked)
    running = []
    wait = 0
    while left or engine.unfinished:
        while left and wait <= 0:
            one = left.pop(0)
            answers = engine.add(one.prompt, one.params, one.mode, priority=one.priority)
            running += [(one, sequence) for sequence in answers]
            wait = left[0].arrival if left else 0
        wait -= 1
        engine.step()
        engine.scheduler.check()
        for one, sequence in running:
            tokens = len(sequence.tokens) - sequence.prompt_tokens
            if one.cancelled_after is not None and sequence.ended_at is None and tokens >= one.cancelled_after:
                engine.cancel(sequence)
    return [sequence.generation(0.0) for _, sequence in running]


def check_answers(asked: list[Asked], found: list[Generation], expected: list[Generation]) -> None:
    """Asserts that all answers are as expected, with their log probabilities; those of cancelled requests may end early."""
    of_answers = [(one, index) for one in asked for index in range(one.params.n)]
    for (one, index), mine, other in zip(of_answers, found, expected, strict=True):
        count = len(mine.token_ids) if one.cancelled_after is not None else len(other.token_ids)
        assert mine.token_ids == other.token_ids[:count], one
        assert mine.finish_reason == (other.finish_reason if mine.finish_reason != "interrupted" else "interrupted")
        assert len(mine.logprobs) == (0 if one.params.logprobs is None else count)
        if one.cancelled_after is None:
            scored = one.params.prompt_logprobs and index == 0  # of several answers, the first one has them
            assert len(mine.prompt_logprobs) == (len(one.prompt) - 1 if scored else 0)
            for (value, best), (other_value, other_best) in zip(
                mine.prompt_logprobs, other.prompt_logprobs, strict=True
            ):
                assert abs(value - other_value) < 1e-4 and len(best) == len(other_best)
        for (value, best), (other_value, other_best) in zip(mine.logprobs, other.logprobs, strict=False):
            assert abs(value - other_value) < 1e-4
            assert [token for token, _ in best] == [token for token, _ in other_best]
