"""Tests. This is a package so that ranks started by `tests.distributed` can import the functions that they run."""
