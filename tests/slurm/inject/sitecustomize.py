"""Injects a fault into the ranks of a job that runs the shipped commands. It is on PYTHONPATH only in that job.

INJECT is one of:
    slow:SECONDS            every rank takes that much longer to read a step's data, until the job restarts
    slow:SECONDS:RANK       the same for one rank, also after a restart
    slow_prompt:SECONDS     every prompt of a file takes that much longer
    nan:STEP:RANK           that rank's states are NaN in that step
    spike:STEP              the states of all ranks are fifty times too large in that step
    hang:STEP:RANK          that rank hangs while reading that step's data
    enospc:STEP:RANK        that rank's disk is full when the checkpoint of that step is written
    die:RANK                that rank is missing a library, at every start
Except for the slow faults and `die`, a fault happens once: a file in INJECT_ONCE prevents a repetition after a restart
or a retry of the step.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path
from typing import Any

KIND, *WORDS = os.environ.get("INJECT", "").split(":")


def _first_time(name: str) -> bool:
    marker = Path(os.environ["INJECT_ONCE"]) / f"{os.environ['SLURM_JOB_ID']}-{name}"
    if marker.exists():
        return False
    marker.touch()
    return True


def _loop(module: Any) -> None:
    original_step, original_draw = module.Trainer._step, module.Trainer._draw

    def draw(trainer: Any) -> Any:
        rank, step = trainer.engine.mesh.rank, trainer.state.step + 1
        original = trainer.loader.step
        trainer.loader.step = lambda first: (_before_data(rank, step), original(first))[1]
        try:
            return original_draw(trainer)
        finally:
            del trainer.loader.step

    def step(trainer: Any, stop: Any) -> Any:
        rank, number = trainer.engine.mesh.rank, trainer.state.step + 1
        factor = None
        if KIND == "nan" and [str(number), str(rank)] == WORDS and _first_time("nan"):
            factor = float("nan")
        if KIND == "spike" and str(number) == WORDS[0] and _first_time(f"spike-{rank}"):
            factor = 50.0
        if factor is None:
            return original_step(trainer, stop)
        hook = trainer.engine.model.final_norm.register_forward_hook(lambda *call: call[2] * factor)
        try:
            return original_step(trainer, stop)
        finally:
            hook.remove()

    module.Trainer._draw, module.Trainer._step = draw, step


def _before_data(rank: int, step: int) -> None:
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if KIND == "slow" and (str(rank) == WORDS[1] if len(WORDS) > 1 else not restarted):
        time.sleep(float(WORDS[0]))
    if KIND == "hang" and [str(step), str(rank)] == WORDS and _first_time("hang"):
        time.sleep(100_000)


def _files(module: Any) -> None:
    original = module.save_file

    def full(tensors: Any, path: str, **options: Any) -> None:
        step, rank = WORDS
        is_target = f"step-{int(step):08d}" in path and f"shard-{int(rank):05d}" in path
        if KIND == "enospc" and is_target and _first_time("enospc"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        original(tensors, path, **options)

    if KIND == "enospc":
        module.save_file = full


def _prompts(module: Any) -> None:
    original = module.PromptFile.work

    def work(share: Any, generate: Any, stop: Any, progress: Any) -> bool:
        def slow(*arguments: Any) -> Any:
            time.sleep(float(WORDS[0]))
            return generate(*arguments)

        return original(share, slow if KIND == "slow_prompt" else generate, stop, progress)

    module.PromptFile.work = work


PATCHES = {
    "recycle_ds.training.loop": _loop,
    "recycle_ds.checkpoint.files.safetensors_writer": _files,
    "recycle_ds.inference.batch.prompt_file": _prompts,
}


class _Patcher(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and patches it once it has been executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                PATCHES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if KIND == "die" and os.environ.get("SLURM_PROCID") == WORDS[0] and "recycle_ds.pretrain" in sys.orig_argv:
    print("ImportError: libcuda.so.1: cannot open shared object file", file=sys.stderr, flush=True)
    os._exit(1)
if KIND:
    sys.meta_path.insert(0, _Patcher())
