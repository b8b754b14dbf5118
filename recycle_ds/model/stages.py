"""Which blocks each pipeline stage holds: a pure function of the shapes.

The first stage also has the embedding; the last one also has the final norm, the recycle module and the output head,
which is used once per loss. The embedding counts as free: a lookup copies `hidden` numbers per token, a block
multiplies millions, and the lookup's backward pass adds `hidden` numbers per token. In a small model with a large
vocabulary the head costs as much as many blocks, so the last stage gets fewer blocks, possibly none."""

from __future__ import annotations

from recycle_ds.config import ConfigError, ModelConfig, RecycleConfig
from recycle_ds.model.flops import block_flops_per_token, tail_flops_per_token

# Measured on a CPU, 135 M weights, 8 sequences: a head of 8 blocks' weights took the time of 5.7 blocks.
_HEAD_SHARE = 0.7


def partition(config: ModelConfig, recycle: RecycleConfig, seq_length: int, stages: int) -> tuple[range, ...]:
    """Blocks of each stage. Minimises the training FLOPs of the most expensive stage.

    Raises ConfigError when there are more stages than blocks.
    """
    block = block_flops_per_token(config, seq_length)
    return _balance(config.layers, stages, block, tail_flops_per_token(config, recycle, seq_length))


def decoding_partition(config: ModelConfig, recycle: RecycleConfig, stages: int) -> tuple[range, ...]:
    """The same for decoding a batch that keeps all stages busy, where reading weights costs more than multiplying by them.

    The recycle module counts as free: such a batch gets few or no drafts. A weight of the head costs less than one of a
    block, which also attends and computes much in small operations (`_HEAD_SHARE`)."""
    block = block_flops_per_token(config, 0)
    head = tail_flops_per_token(config, recycle.model_copy(update={"layers": 0}), 0)
    return _balance(config.layers, stages, block, _HEAD_SHARE * head)


def _balance(layers: int, stages: int, block: float, tail: float) -> tuple[range, ...]:
    """Blocks of each stage, such that the most expensive one is as cheap as possible. tail: what the last stage has
    besides."""
    if stages > layers:
        raise ConfigError(
            f"parallel.pipeline ({stages}) exceeds model.layers ({layers}): a stage would have no block; lower it"
        )
    if stages == 1:
        return (range(layers),)
    counts = [1] * (stages - 1) + [0]
    costs = [block] * (stages - 1) + [tail]
    for _ in range(layers - sum(counts)):
        # ties go to the later stage: earlier stages keep activations of more micro-batches in flight
        cheapest = min(reversed(range(stages)), key=lambda stage: costs[stage] + block)
        counts[cheapest] += 1
        costs[cheapest] += block
    firsts = [sum(counts[:stage]) for stage in range(stages)]
    return tuple(range(first, first + count) for first, count in zip(firsts, counts, strict=True))
