"""How often a training step makes the host wait for the device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recycle_ds.config import RunConfig
from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.runs import make_corpus, tiny_run

_READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"}
_WAITING = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.is_nonzero.default",
}
# Files that work on tensors which are on the host in any case: what the loader read, and the counts of targets.
_HOST = {"loader.py", "batches.py", "targets.py", "sampling.py"}
# DeepSpeed's check of the norm that `GradientControl` gives it, which is a tensor on the host.
_HOST_CHECKS = {"utils.py:is_invalid_grad_norm"}


def _place() -> str:
    """File and function of the package, or of DeepSpeed, that is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if "/recycle_ds/" in name or "/deepspeed/" in name or "/megatron/" in name:
            return f"{Path(name).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown"


class _Reads(TorchFunctionMode):
    """Calls that read a tensor's values, and tensors that are made on a device from the host's values."""

    def __init__(self, found: list[str]) -> None:
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _READS or (name in ("tensor", "as_tensor") and kwargs.get("device") is not None):
            self._found.append(_place())
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Operations whose result's size or value the host needs, those of a backward pass included."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function) in _WAITING:
            self._found.append(_place())
        return function(*args, **(kwargs or {}))


def _count(rank: int, world_size: int, runs: list[RunConfig]) -> list[list[list[str]]]:
    """By run, the waits of each step that neither logs nor is the first."""
    from recycle_ds.training import loop

    original = loop.Trainer._step
    steps: list[list[str]] = []

    def counted(trainer: Any, stop: Any) -> Any:
        found: list[str] = []
        with _Operations(found), _Reads(found):
            result = original(trainer, stop)
        if trainer.state.step > 1:
            places = [place for place in found if place not in _HOST_CHECKS]
            steps.append([place for place in places if place.split(":")[0] not in _HOST])
        return result

    loop.Trainer._step = counted  # type: ignore[method-assign]
    every = []
    for run in runs:
        steps = []
        assert run_all(rank, world_size, [run]) == ["finished"]
        every.append(steps)
    return every


def test_a_step_waits_twice(tmp_path: Path) -> None:
    """Prevents a host that waits for the device within a step, which leaves the device without work: only the losses' agreement
    and the gradients' norm are read, both after the last backward pass."""
    corpus = make_corpus(tmp_path / "corpus")
    common: dict[str, Any] = {"training__log_every": 10, "training__steps": 3, "training__dtype": "bf16"}
    runs = [
        tiny_run(corpus, tmp_path / "joint", **common),
        tiny_run(corpus, tmp_path / "fp32", **common | {"training__dtype": "fp32"}),
        tiny_run(
            corpus, tmp_path / "kl", **common, recycle__objective="kl", recycle__confidence=True, recycle__gradient="detached"
        ),
        tiny_run(corpus, tmp_path / "frozen", **common, recycle__gradient="frozen_backbone", recycle__taps=[0]),
    ]  # fmt: skip
    (every,) = run_ranks(_count, 1, runs)
    for steps in every:
        assert len(steps) == 2
        for found in steps:
            assert "loop.py:_agree" in found, "the modes must see what is known to wait"
            assert len(found) <= 2, found
