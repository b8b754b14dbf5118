"""Observers that the tests add to real runs, and a recording stand-in for the package wandb."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from recycle_ds.config import RecycleError, RunConfig
from recycle_ds.training.observers import (
    EvaluationEnd,
    Event,
    LoggedStep,
    Observer,
    PhaseStart,
    RunEnd,
    RunStart,
    SaveEnd,
    StepEnd,
    StepStart,
)

WANDB = '''
"""The part of wandb's documented interface that a run uses: every call is a line of the file calls.jsonl beside this module."""
import json
from pathlib import Path
def record(name, /, **arguments):
    with Path(__file__).with_name("calls.jsonl").open("a") as file:
        file.write(json.dumps([name, arguments]) + "\\n")
class Settings:
    def __init__(self, *, console="auto"):
        self.console = console
class Run:
    def define_metric(self, name, step_metric=None):
        record("define_metric", name=name, step_metric=step_metric)
    def log(self, data):
        record("log", data=data)
        if FAILS_AT == data["step"]:
            raise ConnectionError("wandb is gone")
    def finish(self, exit_code=None):
        record("finish", exit_code=exit_code)
def init(*, project, name, id, resume, dir, config, settings):
    record("init", project=project, name=name, id=id, resume=resume, dir=dir, config=config, console=settings.console)
    return Run()
'''


class Recorder(Observer):
    """Keeps what it is called with, by the method's name."""

    every_rank = True

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def at_start(self, start: RunStart) -> None:
        self.calls.append(("start", (start.step, start.last, start.model.mesh.rank)))

    def before_step(self, start: StepStart) -> None:
        self.calls.append(("before", (start.step, start.number)))

    def at_phase(self, phase: PhaseStart) -> None:
        self.calls.append(("phase", phase.phase))

    def after_step(self, end: StepEnd) -> None:
        self.calls.append(("after", (end.step, end.number, end.action, end.completed)))

    def at_log(self, log: LoggedStep) -> None:
        self.calls.append(("log", dict(log.metrics)))

    def after_evaluation(self, end: EvaluationEnd) -> None:
        self.calls.append(("evaluation", (end.step, end.metrics["eval_loss"])))

    def at_save(self, save: SaveEnd) -> None:
        self.calls.append(("save", (save.step, save.folder is not None)))

    def at_event(self, event: Event) -> None:
        self.calls.append(("event", (event.name, event.step)))

    def at_end(self, end: RunEnd) -> None:
        self.calls.append(("end", (end.step, end.reason, end.steps, end.error is None)))


class Poison(Observer):
    """Spoils the first attempt at step 3 on rank 1."""

    every_rank = True

    def at_start(self, start: RunStart) -> None:
        self._model, self._hook = start.model, None

    def before_step(self, start: StepStart) -> None:
        if (start.number, self._model.mesh.rank) == (3, 1):
            assert self._model.final_norm is not None
            self._hook = self._model.final_norm.register_forward_hook(lambda *call: call[2] * float("nan"))

    def after_step(self, end: StepEnd) -> None:
        if self._hook is not None:
            self._hook.remove()


class Columns(Observer):
    """A figure of its own in every logged step, and an anomaly at step 2. On rank 0, as it does not ask for more."""

    created: ClassVar[int] = 0

    def __init__(self) -> None:
        type(self).created += 1

    def figures(self, end: StepEnd) -> dict[str, Any]:
        return {"perplexity": end.losses[0] * 10}

    def after_step(self, end: StepEnd) -> None:
        if end.step == 2:
            self.report("odd", end.step, "step 2 is odd", even=True)


class Broken(Observer):
    """Fails on one rank in step 2."""

    every_rank = True

    def __init__(self, rank: int, method: str) -> None:
        self.rank, self.method = rank, method

    def at_start(self, start: RunStart) -> None:
        self._fail("at_start", start.model.mesh.rank, 2)
        self.here = start.model.mesh.rank

    def after_step(self, end: StepEnd) -> None:
        self._fail("after_step", self.here, end.step)

    def at_end(self, end: RunEnd) -> None:
        self._fail("at_end", self.here, 2)

    def _fail(self, method: str, rank: int, step: int) -> None:
        if (method, rank, step) == (self.method, self.rank, 2):
            raise KeyError("no such colour")


def run_observed(
    rank: int, world_size: int, runs: list[tuple[RunConfig, Callable[[], list[Observer]]]], folder: str = ""
) -> list[tuple[str, str, list[Any]]]:
    """Trains each configuration with its observers. Returns the ending, the output, and how many `Columns` were created,
    followed by the calls of each `Recorder`. folder: goes on sys.path."""
    import os

    from recycle_ds.parallel import rendezvous
    from recycle_ds.pretrain import run

    if folder:
        sys.path.insert(0, folder)
    rendezvous.start(rendezvous.detect_launch(os.environ))
    results = []
    for config, make in runs:
        observers = make()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                ending = run(config, observers=observers)
            except RecycleError as error:
                ending = f"error: {error}"
        calls = [one.calls for one in observers if isinstance(one, Recorder)]
        results.append((ending, output.getvalue(), [Columns.created, *calls]))
    return results


def stand_in(folder: Path, fails_at: int = 0) -> str:
    """Writes the stand-in for wandb into a folder, and returns the folder."""
    folder.mkdir(parents=True)
    (folder / "wandb.py").write_text(WANDB.replace("FAILS_AT", str(fails_at)))
    return str(folder)
