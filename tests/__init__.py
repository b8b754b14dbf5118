"""Tests; a package, so that ranks started by `tests.distributed` can import the functions they are to run."""
