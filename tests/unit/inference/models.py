"""Tiny models and a detokeniser for the decoding tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.inference.parameters import TokenSampling
from recycle_ds.inference.speculation import adjusting, sampling
from recycle_ds.inference.speculation.vocabulary import Vocabulary
from recycle_ds.model import RecycleGPT, build_model
from recycle_ds.model.sharding import pieces

LETTERS = "abcdefghijklmnop"
ADDED = ("recycle.tap_projection", "recycle.confidence")


@lru_cache(maxsize=64)
def random_model(
    vocab_size: int = 6,
    seed: int = 0,
    *,
    layers: int = 2,
    recycle_layers: int = 1,
    max_positions: int = 48,
    std: float = 0.6,
    taps: tuple[int, ...] = (),
) -> RecycleGPT:
    """Random weights, large enough that the most likely token changes from position to position.

    In a small vocabulary the module agrees with the backbone by chance: some drafts are accepted, some rejected.
    """
    config = ModelConfig(
        layers=layers,
        hidden=16,
        heads=4,
        kv_heads=2,
        ffn=24,
        vocab_size=vocab_size,
        max_positions=max_positions,
        init_std=std,
    )
    return spread_added(build_model(config, RecycleConfig(layers=recycle_layers, taps=taps), seed=seed).eval())


@torch.no_grad()
def spread_added(model: RecycleGPT, std: float = 0.4) -> RecycleGPT:
    """Random values for the parts of the module that start at zero, the same at every layout."""
    for name, row in pieces(model, model.mesh).items():
        for piece in row:
            if name.startswith("recycle.") and piece.name.startswith(ADDED):
                full = torch.empty(piece.shape).normal_(0.0, std, generator=torch.Generator().manual_seed(len(name)))
                part = full.narrow(piece.axis, piece.start, piece.length)
                model.get_parameter(name).narrow(piece.axis, piece.local_start, piece.length).copy_(part)
    return model


def overfitted_model(
    tokens: list[int], vocab_size: int, depth: int = 3, steps: int = 110, stride: int = 1, max_positions: int = 128
) -> RecycleGPT:
    """A model overfitted on one repeating text. stride: tokens between the starts of two samples."""
    torch.manual_seed(0)
    shape = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48}
    config = ModelConfig(**shape, vocab_size=vocab_size, max_positions=max_positions)
    model = build_model(config, RecycleConfig(layers=1, depth=depth, loss_weight=1.0), seed=1)
    length = 48
    starts = range(0, len(tokens), stride)
    repeated = tokens * (2 + length // len(tokens) + 1)
    samples_BT = torch.tensor([repeated[start : start + length + 1] for start in starts])
    documents_BT = torch.zeros_like(samples_BT)
    targets = make_targets(samples_BT, documents_BT, depth)
    positions_BS = torch.arange(length).expand(len(samples_BT), -1)
    batch = Batch(samples_BT[:, :-1], positions_BS, documents_BT[:, :-1], targets.inputs, targets.targets)
    counts = (targets.targets >= 0).flatten(1).sum(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = model.train_losses(batch, 1.0 / counts)
        loss.backward()
        optimizer.step()
    return model.eval()


class Letters:
    """A detokeniser of one letter per token."""

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        """prompt: whose answer it decodes."""

    def feed(self, token_id: int) -> str:
        """The token's letter."""
        return LETTERS[token_id]

    def flush(self) -> str:
        """Returns no text: no letter is held back."""
        return ""


def probabilities(logits_V: torch.Tensor, params: TokenSampling, history_L: torch.Tensor) -> torch.Tensor:
    """The distribution of the next token after a history, all of it output."""
    vocabulary = Vocabulary(0, len(logits_V))
    position = adjusting.Position(params, 0, len(history_L), len(history_L), history=lambda: history_L)
    adjusted_1V = adjusting.Adjuster(vocabulary).adjust(logits_V[None], [position])
    return sampling.probabilities(adjusted_1V, [params], vocabulary)[0]


@torch.no_grad()
def next_logits(model: RecycleGPT, tokens: list[int]) -> torch.Tensor:
    """The full model's logits after some tokens [V], in one pass without a cache."""
    return model.logits(model.hidden_states(torch.tensor([tokens]))[-1:])[0, 0]


@torch.no_grad()
def drafts_from_scratch(model: RecycleGPT, tokens: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Greedy drafts after some tokens by the definition, with the unrolled pass of training: r^k of the last complete
    entry."""
    drafts: list[int] = []
    length = len(tokens) - 1
    unrolled = model.recycle_config
    try:
        for depth in range(1, count + 1):
            model.recycle_config = unrolled.model_copy(update={"depth": depth})
            read = torch.tensor([*tokens, *drafts])
            inputs = torch.stack([read[k : k + length] for k in range(depth + 1)])[:, None]
            positions, documents = torch.arange(length)[None], torch.zeros(1, length, dtype=torch.int64)
            states = model.states(Batch(inputs[0], positions, documents, inputs, inputs))
            logits_V = model.logits(states[depth][-1:])[0, 0]
            drafts.append(int(adjusting.penalise(logits_V, penalty, read).argmax()))
    finally:
        model.recycle_config = unrolled
    return drafts


def joint_distribution(
    model: RecycleGPT, prompt: list[int], params: TokenSampling, count: int
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `count` tokens, by enumeration with the full model, without a cache."""
    joint = {(): 1.0}
    for _ in range(count):
        longer = {}
        for tokens, chance in joint.items():
            known = [*prompt, *tokens]
            probs = probabilities(next_logits(model, known), params, torch.tensor(known)).tolist()
            longer |= {(*tokens, token): chance * p for token, p in enumerate(probs)}
        joint = longer
    return joint


def agreement(counts: Counter[tuple[int, ...]], joint: dict[tuple[int, ...], float]) -> float:
    """Chi-squared p-value of observed continuations against a joint distribution; 0 if an impossible one was observed."""
    if any(joint[tokens] == 0 for tokens in counts):
        return 0.0
    from scipy.stats import chisquare  # here, because the checks on GPUs use these models where there is no SciPy

    trials = counts.total()
    likely = [cell for cell in joint if trials * joint[cell] >= 5]
    rest = [cell for cell in joint if cell not in likely]
    observed = [counts[cell] for cell in likely] + [sum(counts[cell] for cell in rest)]
    expected = [trials * joint[cell] for cell in likely] + [trials * sum(joint[cell] for cell in rest)]
    assert len(likely) > 10, "the test needs cells"
    return float(chisquare(observed, expected, sum_check=False).pvalue)
