"""Checkpoints of a run: saving while it trains, resuming, the lock on its folder."""
