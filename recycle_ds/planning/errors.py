"""Errors of the planner that a user can mend."""

from __future__ import annotations

from recycle_ds.config import RecycleError


class PlanningError(RecycleError):
    """A cluster, a GPU or a layout that cannot be planned for."""
