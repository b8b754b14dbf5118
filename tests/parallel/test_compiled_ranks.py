"""The compiled kernels over tensor ranks: blocks are shards, and the ranks sum through memory that they share."""

from __future__ import annotations

import contextlib
import io
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.inference.engine import collectives as module
from recycle_ds.inference.engine.build import team_engine
from recycle_ds.inference.engine.cache import Tokens
from recycle_ds.inference.engine.collectives import SharedMemoryCollectives, collectives
from recycle_ds.inference.engine.team import build_team
from recycle_ds.inference.engine.weights import StageWeights
from recycle_ds.inference.native import library
from recycle_ds.inference.native.spans import Span, divided
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.parallel.common_memory import LINE, common_memory
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.peers import PeerLost
from tests.distributed import run_ranks
from tests.unit.inference.engine.requests import Asked, check_answers, decode_together, memory_of, requests
from tests.unit.inference.models import spread_added
from tests.unit.inference.native.kernels import needs_kernels

CONFIG = ModelConfig(
    layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab_size=7, vocab_multiple=4, max_positions=96,
    init_std=0.3, qkv_bias=True,
)  # fmt: skip
RECYCLE = RecycleConfig(layers=1, taps=(0, 1))
COUNT = 21


def _model(mesh: Mesh | None, *, int8: bool) -> RecycleGPT:
    model = build_model(CONFIG, RECYCLE, mesh, seed=3, dtype=torch.bfloat16).eval()
    model.int8 = int8
    return spread_added(model)


def _decode(rank: int, world_size: int, tensor: int, pipeline: int, asked: list[Asked]) -> None:
    """Decodes requests together and, with the same ranks, one after the other without drafts. The owner compares."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    team = build_team(tensor, pipeline, torch.device("cpu"))
    for int8 in (False, True):
        model = _model(team.mesh, int8=int8)
        with contextlib.redirect_stderr(io.StringIO()) as notes:
            engine = team_engine(model, team, max_batch=12, kv_memory_gib=memory_of(model, 14))
        if engine is None:
            continue
        assert notes.getvalue() == "", "the test needs the kernels"
        found = decode_together(engine, asked)
        assert sum(sum(one.accepted) for one in found) > 5, "the test needs accepted drafts"
        expected = []
        for one in asked:
            mode = one.mode if one.mode == "alternate" else "autoregressive"
            (sequence,) = engine.add(one.prompt, one.params, mode)
            engine.finish([sequence])
            expected.append(sequence.generation(0.0))
        engine.close()
        check_answers(asked, found, expected)


@needs_kernels
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (2, 2)])
def test_drafts_and_batches_change_no_token(tensor: int, pipeline: int) -> None:
    """Prevents ranks that round a sum differently, or in an order that depends on the batch, and exchanges of the kernels
    and of the choice of tokens that mix."""
    run_ranks(_decode, tensor * pipeline, tensor, pipeline, requests(16, vocabulary=7, seed=1))


def _states(weights: StageWeights) -> list[Tensor]:
    """States of the blocks and of the module after some tokens, in two calls, and in a tree of drafts after the last."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 7, (COUNT + 7,), generator=generator)
    shape = (3, 2 * 16, 2 * weights.kv_heads, weights.channels)
    caches = [torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)]
    found: list[Tensor] = []
    for first, count, parents in ((0, 1, ()), (1, COUNT - 1, ()), (COUNT - 1, 8, (0, 0, 2, 1, 3, 3, 1))):
        spans, slots = [Span((1, 0), first, count, 0, COUNT - 1, parents)], torch.arange(first, first + count)
        x = weights.embed(ids[first : first + count])
        states = weights.run(x, Tokens(caches[0], spans, slots, 16))
        assert weights.module is not None and weights._stack is not None
        drafted = weights.module(states, x, Tokens(caches[1], spans, slots, 16))
        found += [states[:, : CONFIG.hidden], drafted]
    return found


def _compute(rank: int, world_size: int, room: int, threads: int) -> tuple[list[Tensor], str]:
    """The states by tensor ranks with `room` bytes for each exchange, and the error when the others do not take part."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.set_num_threads(threads)
    module._ROOM = room
    team = build_team(world_size, 1, torch.device("cpu"))
    memory = common_memory(team.mesh.tensor.group, (LINE + 2 * room) * world_size)
    assert memory is not None
    ranks = SharedMemoryCollectives(team.mesh.tensor, memory, timeout=0.5 if rank == 0 else 60)
    error = ""
    with torch.inference_mode():
        weights = StageWeights(_model(team.mesh, int8=False), ranks)
        assert weights.why_not_compiled is None
        assert weights.contents(torch.zeros(16, dtype=torch.int64), torch.zeros(0, 0)) is None, (
            "it has a part of the model"
        )
        states = _states(weights)
        assert weights._stack is not None
        dist.barrier()
        if rank == 0:
            x, cache = torch.zeros(1, CONFIG.hidden, dtype=torch.bfloat16), torch.zeros(3, 16, 2, 16).bfloat16()
            with pytest.raises(PeerLost) as lost:
                weights._stack((x,), [Span((0,), 0, 1)], cache)
            error = str(lost.value)
    return states, error


@needs_kernels
def test_states_are_those_of_one_process() -> None:
    """Prevents a shard or a share of the columns in the wrong place, ranks or threads with other bits, a place that is too
    small for a long prompt, and waiting for ever for a rank that hangs."""
    with torch.inference_mode():
        expected = _states(StageWeights(_model(None, int8=False)))
    runs = [run_ranks(_compute, 2, room, threads) for room, threads in ((2**20, 1), (6 * 4 * CONFIG.hidden, 2))]
    reference = runs[0][0][0]
    for results in runs:
        assert [error for _, error in results] == ["rank 1 has not answered for 0 s: it hangs", ""]
        for states, _ in results:
            for one, other, same in zip(states, expected, reference, strict=True):
                assert torch.equal(one, same)
                assert (one.float() - other.float()).abs().mean() < 0.02 * other.float().abs().mean()


def test_tokens_are_divided_in_order() -> None:
    """Prevents a token that is computed twice, or before those that it attends to."""
    spans = [Span((4, 2), 3, 5), Span((1,), 0, 1, lowest=1), Span((0,), 2, 2)]
    assert divided(spans, 8) == [spans]
    groups = divided(spans, 3)
    assert [[(span.first, span.count) for span in group] for group in groups] == [[(3, 3)], [(6, 2), (0, 1)], [(2, 2)]]
    assert groups[1][1] == spans[1]


def _without_compiler(rank: int, world_size: int) -> tuple[str, list[int]]:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    if rank == 1:
        os.environ["CC"] = "no-such-compiler"
        library._loaded.cache_clear()
    team = build_team(world_size, 1, torch.device("cpu"))
    with contextlib.redirect_stderr(io.StringIO()) as notes:
        engine = team_engine(_model(team.mesh, int8=False), team, max_batch=1)
    if engine is None:
        return notes.getvalue(), []
    (sequence,) = engine.add([1, 2], SamplingParams(max_new_tokens=4, ignore_eos=True), "verified")
    engine.finish([sequence])
    engine.close()
    return notes.getvalue(), sequence.tokens


@needs_kernels
def test_a_rank_without_a_compiler() -> None:
    """Prevents ranks of which only some use the kernels: they would wait for each other in different exchanges."""
    (note, tokens), (other_note, _) = run_ranks(_without_compiler, 2)
    assert note == "note: decoding without the compiled kernels: rank 1: there is no C compiler CC='no-such-compiler'\n"
    assert other_note == "" and len(tokens) == 6


def _exchange_of(rank: int, world_size: int) -> tuple[bool, str | None]:
    """Whether ranks without shared memory have an exchange, and why they do without the kernels."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    team = build_team(world_size, 1, torch.device("cpu"))
    ranks = module.GroupCollectives(team.mesh.tensor)
    shared = collectives(team.mesh.tensor, torch.device("cpu")).exchange is not None
    return shared, StageWeights(_model(team.mesh, int8=False), ranks).why_not_compiled


@needs_kernels
def test_ranks_without_shared_memory() -> None:
    """Prevents kernels over ranks of several hosts, which cannot exchange anything in them."""
    reason = "the 2 tensor ranks share no memory: they are on several hosts, or /dev/shm is too small"
    assert run_ranks(_exchange_of, 2) == [(True, reason)] * 2
