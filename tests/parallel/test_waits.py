"""How often a training step makes the host wait for the device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recycle_ds.config import RunConfig
from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.runs import make_corpus, tiny_run, zero

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

    def __init__(self, found: list[str], is_paused: Callable[[], bool]) -> None:
        self._found, self._is_paused = found, is_paused

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        is_upload = name in ("tensor", "as_tensor") and kwargs.get("device") is not None
        if (name in _READS or is_upload) and not self._is_paused():
            self._found.append(_place())
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Operations whose result's size or value the host needs, those of a backward pass included."""

    def __init__(self, found: list[str], is_paused: Callable[[], bool]) -> None:
        super().__init__()
        self._found, self._is_paused = found, is_paused

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function) in _WAITING and not self._is_paused():
            self._found.append(_place())
        return function(*args, **(kwargs or {}))


@dataclass
class _Step:
    """What a step waited for in other places than `read`, and which steps' numbers it read: its own and the one before it."""

    waits: list[str] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)


def _count(rank: int, world_size: int, runs: list[RunConfig]) -> list[dict[int, _Step]]:
    """By run, what each step of a start but the first waited for."""
    from recycle_ds.training import loop

    original, download = loop.Trainer._step, loop.download
    steps: dict[int, _Step] = {}
    step, reading = 0, False
    every: list[dict[int, _Step]] = []

    def counted(trainer: Any, stop: Any) -> Any:
        nonlocal step
        step = trainer.state.step + 1
        steps[step] = _Step()
        found: list[str] = []
        with _Operations(found, lambda: reading), _Reads(found, lambda: reading):
            result = original(trainer, stop)
        places = [place for place in found if place not in _HOST_CHECKS]
        steps[step].waits = [place for place in places if place.split(":")[0] not in _HOST]
        return result

    def noted(*tensors: Any) -> Any:
        read, launched = download(*tensors), step

        def wait() -> Any:
            nonlocal reading
            steps[step].reads.append(launched - step)
            reading = True
            try:
                return read()
            finally:
                reading = False

        return wait

    loop.Trainer._step, loop.download = counted, noted  # type: ignore[method-assign]
    loop.runs_ahead = lambda _: True  # as on a GPU
    for run in runs:
        steps = {}
        assert run_all(rank, world_size, [run]) == ["finished"]
        every.append(steps)
    return every


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_does_not_wait(tmp_path: Path, ranks: int) -> None:
    """Prevents a host that waits for the device within a step, which leaves the device without work: what is read is that of
    the step before, while the device computes this one. Steps that are logged, saved or evaluated read their own numbers."""
    corpus = make_corpus(tmp_path / "corpus")
    common: dict[str, Any] = {"training__log_every": 5, "training__steps": 8, "training__dtype": "bf16"}
    runs = [
        tiny_run(corpus, tmp_path / "joint", **common),
        tiny_run(corpus, tmp_path / "zero3", deepspeed=zero(3), **common),
        tiny_run(corpus, tmp_path / "zero0", deepspeed=zero(0), **common),
        tiny_run(corpus, tmp_path / "fp32", deepspeed=zero(0), **common | {"training__dtype": "fp32"}),
        tiny_run(
            corpus, tmp_path / "kl", **common, recycle__objective="kl", recycle__confidence=True, recycle__gradient="detached"
        ),
        tiny_run(corpus, tmp_path / "frozen", **common, recycle__gradient="frozen_backbone", recycle__taps=[0]),
    ]  # fmt: skip
    for every in run_ranks(_count, ranks, runs):
        for steps in every:
            assert {step: one.reads for step, one in steps.items()} == {
                1: [0], 2: [], 3: [-1], 4: [-1], 5: [-1, 0], 6: [], 7: [-1], 8: [-1, 0],
            }  # fmt: skip
            assert not [one.waits for step, one in steps.items() if step not in (1, 5, 8) and one.waits]


def test_judging_spikes_waits(tmp_path: Path) -> None:
    """Prevents a test whose modes do not see the host wait, and an update that is applied before the host has judged it."""
    corpus = make_corpus(tmp_path / "corpus")
    run = tiny_run(corpus, tmp_path / "run", training__log_every=5, training__steps=4, faults__spike="skip")
    ((steps,),) = run_ranks(_count, 1, [run])
    assert [one.reads for one in steps.values()] == [[0, 0]] * 4
    assert [set(one.waits) for one in steps.values()][1:3] == [{"gradients.py:_decide"}] * 2
