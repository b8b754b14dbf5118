"""Tests for one CUDA GPU: run by `make gpu`, file by file, without pytest; pytest runs them too, and skips them without a GPU.

Every file `test_X.py` is a part X of the check. A test is a plain function without parameters, or with `tmp_path` alone. The
device comes from device.py, so that `--device cpu` rehearses the same functions.
"""
