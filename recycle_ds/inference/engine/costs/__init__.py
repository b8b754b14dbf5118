"""Measured costs of calls, in memory and on disk."""
