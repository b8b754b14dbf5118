"""What the losses of every pass depend on besides a batch, its states and the weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recycle_ds.config import RecycleConfig
from recycle_ds.model.losses.chunks import HeadShard
from recycle_ds.model.losses.draft_columns import DraftColumns
from recycle_ds.model.losses.fused import FusedLosses
from recycle_ds.parallel.mesh import Axis


@dataclass
class LossSettings:
    """Of one model. The first four are given when it is built; training sets the others before its first step."""

    recycle: RecycleConfig
    """Its objective, its gradient and whether it has a confidence layer."""
    shard: HeadShard
    """This rank's part of the head."""
    ulysses: Axis
    """The ranks that a sequence's positions are split over."""
    chunk: int
    """Rows of logits in memory at once."""
    drafts: DraftColumns | None = None
    """The draft vocabulary that the module's losses are restricted to; None for the complete one."""
    counted_tokens: Tensor | None = None
    """Bool [V] on the CPU: the targets that count for the module's losses; None if all do."""
    fused: FusedLosses | None = None
    """The losses' compiled functions, if training compiles."""

    def restrict(self, drafts: DraftColumns) -> None:
        """Restricts the module's losses to a draft vocabulary. The text's other tokens then have no cross entropy."""
        self.drafts = drafts
        if self.recycle.objective == "cross_entropy":
            self.counted_tokens = drafts.table.cpu()
