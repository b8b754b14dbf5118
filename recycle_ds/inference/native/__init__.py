"""Compiled kernels for decoding on CPUs, and their Python side."""
