"""Checkpoints of a run: saving during training, resuming, and the lock on the run folder."""
