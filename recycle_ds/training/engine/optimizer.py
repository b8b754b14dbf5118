"""AdamW over parameter groups that are labelled with the part of the model they belong to.

DeepSpeed steps the optimizer on flat fp32 partitions, one group at a time, in an order of its own. The clipping of each part
(recycle module, backbone) and what skips a bad step are therefore stored in the optimizer, by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recycle_ds.config import TrainingConfig
from recycle_ds.parallel.partitions import local_shape

BACKBONE, RECYCLE = "backbone", "recycle"
PARTS = (BACKBONE, RECYCLE)


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter, arXiv 1711.05101) with clipping by part, and steps that change nothing.

    While `hold` is set, step() allocates state and changes nothing: some DeepSpeed optimizers call it during construction,
    where weight decay would already change the weights. What is decided on the device, the fused kernel reads there.
    """

    def __init__(self, groups: list[dict[str, Any]], config: TrainingConfig) -> None:
        super().__init__(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
        )
        self.hold = True
        self.divisors: Mapping[str, Tensor] = {}
        """fp32 scalars by part, which divide its gradients; a part without one is not clipped."""
        self.held: Tensor | None = None
        """fp32 scalar: 1 if the next steps must change nothing, not the number of steps either, 0 otherwise."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the current groups. closure must be None: DeepSpeed passes none."""
        assert closure is None
        if self.hold:
            self.allocate()
            return
        groups = self.param_groups
        try:
            for group in groups:
                # DeepSpeed empties the groups that it is not updating
                own = next((parameter for parameter in group["params"] if parameter.grad is not None), None)
                if own is not None:
                    # waits where the optimizer is offloaded: the fused kernel would not, and read them before they are there
                    self.grad_scale = _on(own.device, self.divisors.get(group["part"]))
                    self.found_inf = _on(own.device, self.held)
                    self.param_groups = [group]
                    super().step()
        finally:
            self.param_groups = groups

    def allocate(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Creates missing moments, zero and at step 0, for the given parameters; by default for those of all groups."""
        if parameters is None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(device)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups, part x decay; norms and biases have no decay.

    The recycle module's parameters never share a group (and so never a flat partition) with the backbone's.
    """
    groups: list[dict[str, Any]] = []
    for part in PARTS:
        for decayed in (True, False):
            members = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and part_of(name) == part and (len(local_shape(parameter)) > 1) == decayed
            ]
            if members:
                decay = weight_decay if decayed else 0.0
                groups.append({"params": members, "weight_decay": decay, "part": part})
    return groups


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to, by its name."""
    return RECYCLE if name.startswith("recycle.") else BACKBONE
