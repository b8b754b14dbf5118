"""Trees of drafts in the engine: their nodes are those of the definition, and no text depends on them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.inference import Decoder, SamplingParams
from recycle_ds.inference.engine import runner
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.cache import Cache, Tokens
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native.spans import Span
from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation import noise
from recycle_ds.inference.speculation.tree import ancestry, parents_of
from recycle_ds.model import RecycleGPT, build_model
from tests.unit.inference.engine.requests import (
    check_answers,
    decode_alone,
    decode_together,
    free_drafts,
    memory_of,
    moves_of,
    requests,
)
from tests.unit.inference.models import agreement, joint_distribution, random_model, spread_added
from tests.unit.inference.native.kernels import bf16_model, needs_kernels

TRIALS, COUNT = 700, 4


@torch.no_grad()
def module_states(model: RecycleGPT, tokens: list[int], drafts: list[int]) -> torch.Tensor:
    """The module's last state after some tokens and drafts [D], with the unrolled pass of training."""
    depth, length, unrolled = len(drafts) + 1, len(tokens) - 1, model.recycle_config
    model.recycle_config = unrolled.model_copy(update={"depth": depth})
    try:
        read = torch.tensor([*tokens, *drafts])
        inputs = torch.stack([read[k : k + length] for k in range(depth + 1)])[:, None]
        positions, documents = torch.arange(length)[None], torch.zeros(1, length, dtype=torch.int64)
        return model.states(Batch(inputs[0], positions, documents, inputs, inputs))[depth][-1, 0]
    finally:
        model.recycle_config = unrolled


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_nodes_of_a_tree_are_those_of_a_computation_from_scratch(confidence: bool, temperature: float) -> None:
    """Prevents nodes that see their siblings, that have the positions of their slots, and confidences of another node, which
    verification would hide."""
    config = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=9, max_positions=64, init_std=0.6)
    recycle = RecycleConfig(layers=2, depth=2, confidence=confidence)
    model = spread_added(build_model(config, recycle, seed=3).eval())
    engine = free_drafts(local_engine(model, max_batch=2))
    params = SamplingParams(temperature, max_new_tokens=12)
    answers = [engine.add(prompt, params, "verified")[0] for prompt in ([1, 2, 3, 4], [5, 2])]
    compared = 0
    while engine.unfinished:
        engine.step()
        for one in answers:
            parents = parents_of(len(one.drafts), one.parents)
            paths = ancestry(parents)
            for node in (0, *set(parents)) if one.drafts and one.ended_at is None else ():
                state = module_states(model, one.tokens, [one.drafts[k - 1] for k in paths[node]])
                logits = model.logits(state[None, None])[0, 0] / (temperature or 1.0)
                if temperature:
                    key = noise.key(one.rules.seed, len(one.tokens) + len(paths[node]), noise.TOKEN)
                    logits = logits - noise.exponentials(torch.tensor([key]), torch.arange(len(logits)))[0].log()
                probs = logits.softmax(-1)
                expected = probs.tolist()
                best = int(probs.argmax())
                if model.recycle is not None and model.recycle.confidence is not None and not temperature:
                    layer = model.recycle.confidence(state).detach().sigmoid().item()
                    expected = [(1 - layer) * p / (1 - expected[best]) for p in expected]
                    expected[best] = layer
                for k, (token, parent) in enumerate(zip(one.drafts, parents, strict=True)):
                    if parent == node and k < one.grown and k + 1 not in one.repeated:
                        compared += 1
                        assert one.confidences[k] == pytest.approx(expected[token], abs=1e-3)
    assert compared > 100


@pytest.mark.parametrize(("batch", "blocks"), [(1, None), (6, 12), (16, None)])
def test_answers_do_not_depend_on_trees(batch: int, blocks: int | None) -> None:
    """Prevents accepted drafts off the main path whose keys, states or log probabilities are those of another node: in
    batches, after preemptions, in shared prefixes, at end tokens and with every parameter."""
    model = random_model(7, 0, max_positions=96, std=0.3)
    memory = None if blocks is None else memory_of(model, blocks)
    engine = free_drafts(local_engine(model, max_batch=batch, kv_memory_gib=memory, eos_ids=(6,)))
    moves = moves_of(engine)
    asked = requests(36, vocabulary=7, seed=2, modes=("verified",))
    asked = [replace(one, params=replace(one.params, draft_tokens=None)) for one in asked]
    found = decode_together(engine, asked)
    check_answers(asked, found, decode_alone(model, asked, eos=6))
    assert sum(moves) > 20, "the test needs accepted drafts off the main path"
    assert blocks is not None or any(one.logprobs and sum(one.accepted) for one in found)
    assert engine.scheduler.reused_tokens > 50, "the test needs shared prefixes"
    assert blocks is None or engine.scheduler.preemptions > 0, "the test needs preemptions"


def test_a_prefix_with_moved_drafts_is_right_for_others() -> None:
    """Prevents blocks that are offered to others before their accepted drafts have been moved, or that never are."""
    model = random_model(7, 0, max_positions=96, std=0.3)
    engine = free_drafts(local_engine(model, max_batch=2))
    moves = moves_of(engine)
    (first,) = engine.add([1, 2, 3], SamplingParams(max_new_tokens=60), "verified")
    engine.finish([first])
    read_back = 0
    for length in range(20, 60, 3):
        (later,) = engine.add(first.tokens[:length], SamplingParams(max_new_tokens=5, logprobs=0), "autoregressive")
        engine.finish([later])
        alone = Decoder(model).generate(
            first.tokens[:length], "autoregressive", TokenSampling(logprobs=0), max_new_tokens=5
        )
        assert tuple(later.tokens[length:]) == alone.token_ids
        assert [value for value, _ in later.logprobs] == pytest.approx([value for value, _ in alone.logprobs], abs=1e-4)
        read_back += later.reused
    assert sum(moves) > 3 and read_back > 100


def _p_value(monkeypatch: pytest.MonkeyPatch) -> float:
    """Chi-squared p-value of many texts sampled without a seed and with trees, sixteen at a time."""
    seeds = iter(range(TRIALS))
    monkeypatch.setattr("recycle_ds.inference.engine.engine.secrets.randbelow", lambda _: next(seeds))
    model = copy.copy(random_model(3, 0, layers=1, std=0.2))
    model.draft_ids = torch.tensor([0, 2])  # else every token would be a child of every node, and none rejected
    engine = free_drafts(local_engine(model, max_batch=16))
    sampling = TokenSampling(0.9, top_p=0.95, repetition_penalty=1.2)
    params = SamplingParams(0.9, top_p=0.95, repetition_penalty=1.2, max_new_tokens=COUNT)
    answers = [engine.add([1], params, "verified")[0] for _ in range(TRIALS)]
    engine.finish(answers)
    accepted, tested = (
        sum(map(sum, counts))
        for counts in zip(*((t.accepted, t.tested) for t in (one.tally for one in answers)), strict=True)
    )
    assert 0.2 < accepted / tested < 0.9, "the test needs accepted and rejected drafts"
    return agreement(Counter(tuple(one.tokens[1:]) for one in answers), joint_distribution(model, [1], sampling, COUNT))


def test_sampling_with_trees_keeps_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents trees, of different sizes for each sequence of a batch, from changing what is sampled without a seed."""
    assert _p_value(monkeypatch) > 1e-4


def test_a_wrong_rule_for_trees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a test too weak to detect a likeliest draft that is always accepted."""
    monkeypatch.setattr(runner, "walk", lambda ids, *rest: [1][: len(ids)])
    assert _p_value(monkeypatch) < 1e-4


def _states(weights: StageWeights, cache: Cache, span: Span, ids: list[int]) -> torch.Tensor:
    slots = cache.slots([span])
    return weights.run(weights.embed(torch.tensor(ids)), Tokens(cache.keys_values, [span], slots, cache.block_size))


@torch.inference_mode()
def test_a_node_has_the_numbers_of_its_path() -> None:
    """Prevents a node that sees nodes off its path, and keys that are wrong after accepted nodes have been moved."""
    weights = StageWeights(random_model(9, 2, max_positions=96))
    known, ids, parents = [1, 2, 3, 4, 5], [6, 7, 8, 2, 3, 4], (0, 1, 0, 3, 3, 5)
    root = len(known) - 1
    blocks = (2, 0)
    cache = Cache(weights, 4, 8)
    _states(weights, cache, Span(blocks, 0, root), known[:root])
    found = _states(weights, cache, Span(blocks, root, 7, root=root, parents=parents), [known[root], *ids])
    for node, path in enumerate(ancestry(parents)):
        own = Cache(weights, 4, 8)
        read = [*known, *(ids[k - 1] for k in path)]
        expected = _states(weights, own, Span((1, 3), 0, len(read)), read)
        assert torch.allclose(found[node], expected[-1], atol=1e-5)
    # nodes 3, 5 and 6 are accepted
    size = cache.block_size
    slots = [blocks[at // size] * size + at % size for at in range(2 * size)]
    cache.move([(slots[root + node], slots[root + depth]) for depth, node in enumerate((3, 5, 6), start=1)])
    after = _states(weights, cache, Span(blocks, root + 4, 1), [5])
    own = Cache(weights, 4, 8)
    read = [*known, 8, 3, 4, 5]
    assert torch.allclose(after[0], _states(weights, own, Span((1, 3), 0, len(read)), read)[-1], atol=1e-5)


@needs_kernels
@torch.inference_mode()
def test_moves_in_the_order_of_the_compiled_kernels() -> None:
    """Prevents moved keys and values that the compiled kernels find in another place of their blocks."""
    weights = StageWeights(bf16_model())
    assert weights.why_not_compiled is None
    cache = Cache(weights, 6, 16)
    tokens = [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1, 0]
    _states(weights, cache, Span((4, 0), 0, len(tokens)), tokens)
    spoilt = [*tokens[:3], 0, 0, *tokens[5:17], 6, *tokens[18:]]  # in other places of both blocks
    _states(weights, cache, Span((1, 3), 0, len(spoilt)), spoilt)
    expected = _states(weights, cache, Span((4, 0), len(tokens), 1), [2])
    assert not torch.equal(_states(weights, cache, Span((1, 3), len(tokens), 1), [2]), expected)
    wrong = range(3, len(tokens))  # later positions have seen the wrong tokens
    pairs = [((4, 0)[at // 16] * 16 + at % 16, (1, 3)[at // 16] * 16 + at % 16) for at in wrong]
    cache.move(pairs)
    assert torch.equal(_states(weights, cache, Span((1, 3), len(tokens), 1), [2]), expected)


@needs_kernels
@torch.inference_mode()
def test_a_stage_without_blocks_moves_nothing() -> None:
    """Prevents a pipeline whose last stage has the recycle module and no block of the backbone from not starting."""
    model = copy.deepcopy(bf16_model())
    model.blocks = torch.nn.ModuleDict()
    weights = StageWeights(model)
    assert weights.why_not_compiled is None and weights.layers == 0
    cache = Cache(weights, 6, 16)
    cache.tokens[:] = torch.arange(96)
    cache.move([(5, 4)])
    cache.move_states([(5, 4)])
    assert cache.tokens[4] == 5
