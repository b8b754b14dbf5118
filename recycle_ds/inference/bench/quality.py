"""What a lossy mode costs: how likely the full model finds its text, and how often it agrees with the model's own choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recycle_ds.model import RecycleGPT

Tokens = Sequence[int]


def quality(
    model: RecycleGPT, prompts: Sequence[Tokens], reference: Sequence[Tokens], found: Sequence[Tokens]
) -> dict[str, float]:
    """Figures of the texts of a mode against those of `autoregressive`, by prompt.

    log_likelihood: mean over all tokens of log p(token | all before it) under the full model, in nats;
    log_likelihood_autoregressive: the same of the reference. Both are at temperature 1, in PyTorch's operations.
    tokens_before_divergence: mean number of leading tokens that are the same. agreement: of the tokens up to and including
    the first that differs, the share that are the same; later ones continue another text and are not compared.
    """
    same = [shared_prefix(one, other) for one, other in zip(reference, found, strict=True)]
    differ = sum(length < min(len(a), len(b)) for length, a, b in zip(same, reference, found, strict=True))
    return {
        "log_likelihood": mean_log_likelihood(model, prompts, found),
        "log_likelihood_autoregressive": mean_log_likelihood(model, prompts, reference),
        "tokens_before_divergence": sum(same) / len(same),
        "agreement": sum(same) / max(sum(same) + differ, 1),
    }


def shared_prefix(one: Tokens, other: Tokens) -> int:
    """Number of leading tokens that two texts share."""
    pairs = zip(one, other, strict=False)  # the shorter one may be a prefix of the longer one
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@torch.inference_mode()
def mean_log_likelihood(model: RecycleGPT, prompts: Sequence[Tokens], texts: Sequence[Tokens]) -> float:
    """Mean over all tokens of the texts of log p(token | prompt and the tokens before it), in nats."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        tokens_1T = torch.tensor([[*prompt, *text]], device=device)
        states_T1D = model.hidden_states(tokens_1T)[len(prompt) - 1 : -1]
        chances_TV = model.logits(states_T1D)[:, 0].float().log_softmax(-1)
        total += chances_TV.gather(1, tokens_1T[0, len(prompt) :, None]).sum().item()
        count += len(text)
    return total / count
