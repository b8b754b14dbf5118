"""For optimizers of DeepSpeed whose gradients are final only inside their step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from recycle_ds.training.engine.zero.adapter import ZeroAdapter


class DecidedInside(ZeroAdapter):
    """The gradients are final only inside DeepSpeed's step: `decide` is called from there, in place of its own norm."""

    def step(self, take_step: Callable[[], None]) -> None:
        """See `ZeroAdapter`."""
        take_step()

    def _norm_for_deepspeed(self) -> Tensor:
        return torch.tensor(self._decide())

    def _norms_on_host(self, members: list[nn.Parameter], counted: AbstractSet[nn.Parameter]) -> list[Tensor]:
        """Norms that DeepSpeed computed when it moved gradients to the host; an unused parameter has none."""
        norms = self._zero.norm_for_param_grads
        ids = [self._zero.get_param_id(p) for p in members if p in counted]
        return [torch.as_tensor(norms[key]) for key in ids if key in norms]
