"""The output head in chunks of rows: cross entropy of all states, and the recycle module's objectives."""

from recycle_ds.model.losses.chunks import HeadShard
from recycle_ds.model.losses.cross_entropy import head_losses, head_predictions
from recycle_ds.model.losses.draft_columns import DraftColumns
from recycle_ds.model.losses.evaluation import evaluation_sums
from recycle_ds.model.losses.fused import FusedLosses
from recycle_ds.model.losses.module_losses import ModuleHead, module_losses
from recycle_ds.model.losses.settings import LossSettings
from recycle_ds.model.losses.training import training_losses

__all__ = [
    "DraftColumns",
    "FusedLosses",
    "HeadShard",
    "LossSettings",
    "ModuleHead",
    "evaluation_sums",
    "head_losses",
    "head_predictions",
    "module_losses",
    "training_losses",
]
