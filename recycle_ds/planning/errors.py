"""Errors of the planner that the user can fix."""

from __future__ import annotations

from recycle_ds.config import RecycleError


class PlanningError(RecycleError):
    """A cluster or GPU that cannot be planned for, or a layout that fails verification."""
