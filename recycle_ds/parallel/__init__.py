"""Ranks, groups and devices: the only place that asks which launcher, backend and device there are."""
