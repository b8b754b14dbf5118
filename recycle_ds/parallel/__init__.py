"""Ranks, process groups and devices. The only package that detects launcher, backend and device."""
