"""The distribution of blocks over pipeline stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig
from recycle_ds.model.flops import block_flops_per_token, tail_flops_per_token
from recycle_ds.model.stages import decoding_partition, partition


def shape(layers: int, vocab_size: int = 32_000, hidden: int = 512) -> ModelConfig:
    return ModelConfig(layers=layers, hidden=hidden, heads=8, kv_heads=4, ffn=4 * hidden, vocab_size=vocab_size)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(100, 100_000), st.integers(0, 4))
def test_stages_tile_the_blocks(layers: int, stages: int, vocab_size: int, depth: int) -> None:
    """Prevents a block that two stages or no stage runs, and a stage without blocks before the last stage."""
    recycle = RecycleConfig(layers=1 if depth else 0, depth=max(1, depth))
    if stages > layers:
        with pytest.raises(ConfigError, match=rf"parallel.pipeline \({stages}\) exceeds model.layers \({layers}\)"):
            partition(shape(layers, vocab_size), recycle, 512, stages)
        return
    parts = partition(shape(layers, vocab_size), recycle, 512, stages)
    assert [block for part in parts for block in part] == list(range(layers))
    assert len(parts) == stages and all(len(part) > 0 for part in parts[:-1])


@pytest.mark.parametrize(("layers", "stages", "vocab_size"), [(24, 4, 32_000), (30, 2, 49_152), (80, 8, 32_000)])
def test_the_most_expensive_stage_is_as_cheap_as_possible(layers: int, stages: int, vocab_size: int) -> None:
    """Prevents a last stage that delays all others because it has the head and as many blocks as they have."""
    config, recycle = shape(layers, vocab_size), RecycleConfig(depth=2)
    block = block_flops_per_token(config, 512)
    tail = tail_flops_per_token(config, recycle, 512)
    counts = [len(part) for part in partition(config, recycle, 512, stages)]
    cost = max([count * block for count in counts[:-1]] + [counts[-1] * block + tail])
    # the minimum over all numbers of blocks on the last stage
    best = min(max(-(-(layers - last) // (stages - 1)) * block, last * block + tail) for last in range(layers))
    assert cost == pytest.approx(best)


def test_a_large_head_leaves_fewer_blocks() -> None:
    """Prevents stage costs that omit the head or the unrolled module."""
    parts = partition(shape(12, vocab_size=100_000, hidden=256), RecycleConfig(depth=3), 256, 2)
    assert len(parts[-1]) == 0
    even = partition(shape(12, vocab_size=10), RecycleConfig(layers=0), 256, 2)
    assert [len(part) for part in even] == [6, 6]


def test_stages_of_decoding_take_equal_time() -> None:
    """Prevents a first stage that waits for the last one, whose head is read once in decoding and trained several times."""
    config = ModelConfig(layers=30, hidden=576, heads=9, kv_heads=3, ffn=1536, vocab_size=49152)
    recycle = RecycleConfig(layers=1, depth=5)
    first, last = decoding_partition(config, recycle, 2)
    head_in_blocks = 576 * 49152 / (576 * 64 * (2 * 9 + 2 * 3) + 3 * 576 * 1536)
    assert abs(len(first) - (len(last) + 0.7 * head_in_blocks)) <= 1
    assert [*first, *last] == list(range(30))
    assert len(partition(config, recycle, 1024, 2)[1]) < len(last), "training is divided in another way"
