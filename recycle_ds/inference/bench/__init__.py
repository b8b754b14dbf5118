"""Comparison of decoding modes."""
