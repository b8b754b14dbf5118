"""Observers of a run: the order of calls, what a failure leads to, and those that a configuration names."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.config import ConfigError
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.observers import (
    EvaluationEnd,
    Event,
    LoggedStep,
    Observer,
    RunEnd,
    RunStart,
    StepEnd,
    StepStart,
    records,
)
from recycle_ds.training.observers.dispatch import ObserverError, Observers
from recycle_ds.training.observers.loading import check_observers, observer_class, users_observers
from tests.runs import ROOT, tiny_run

START = RunStart(None, None, 0, 9)  # type: ignore[arg-type]
STEP = StepEnd(3, 3, "apply", 3, 2.5, (2.0, 3.0), 1.0, {}, 0.1, 0.5)
ENDED = RunEnd(9, "finished", 9)


class Watching(Observer):
    """Writes its name into `calls` for every call, and fails in the method `fails_in`."""

    def __init__(self, name: str, calls: list[str], fails_in: str = "") -> None:
        self.name, self.calls, self.fails_in = name, calls, fails_in

    def _called(self, method: str) -> None:
        self.calls.append(f"{self.name}.{method}")
        if method == self.fails_in:
            raise OSError(f"{self.name} is full")

    def at_start(self, start: RunStart) -> None:
        self._called("at_start")

    def after_step(self, end: StepEnd) -> None:
        self._called("after_step")

    def figures(self, end: StepEnd) -> dict[str, Any]:
        self._called("figures")
        return {self.name: end.step}

    def at_event(self, event: Event) -> None:
        self._called(f"at_event {event.name}")

    def at_end(self, end: RunEnd) -> None:
        self._called("at_end")


class Dropped(Watching):
    on_error = "drop"


class Essential(Watching):
    on_error = "raise"
    every_rank = True


def test_observers_are_called_in_their_order_and_on_their_ranks() -> None:
    """Prevents logs that are written before the figures are there, and a user's observer that runs once per rank."""
    for mesh, names in ((Mesh(), "ab"), (Mesh(rank=1, world_size=2), "b")):
        calls: list[str] = []
        observers = Observers([Watching("a", calls), Essential("b", calls)], mesh)
        observers.at_start(START)
        observers.before_step(StepStart(3, 3))  # none of them defines it
        observers.after_step(STEP)
        assert observers.figures(STEP) == dict.fromkeys(names, 3)
        observers.at_end(ENDED)
        hooks = ("at_start", "after_step", "figures", "at_end")
        assert calls == [f"{name}.{hook}" for hook in hooks for name in names]


def test_a_failed_log_is_reported_once_and_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a run of a week that ends, or a warning at every step, because a metrics service is gone."""
    calls: list[str] = []
    observers = Observers([Dropped("a", calls, "after_step"), Watching("b", calls)], Mesh())
    observers.at_start(START)
    calls.clear()
    observers.after_step(STEP)
    observers.after_step(STEP)
    observers.at_end(ENDED)
    assert calls == ["a.after_step", "b.at_event observer_dropped", "b.after_step", "b.after_step", "b.at_end"]
    assert observers.failure is None
    other = Observers([Dropped("c", calls, "at_end")], Mesh())
    other.at_start(START)
    other.at_end(ENDED)  # the logs are closed by then
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "warning: rank 0: observer tests.unit.training.test_observers:Dropped failed at step 9: OSError: c"
    )


def test_a_users_failed_observer_ends_the_run_by_name() -> None:
    """Prevents a user's broken check that is passed over, is called again, or whose error does not name it."""
    calls: list[str] = []
    observers = Observers([Watching("a", calls, "after_step"), Watching("b", calls)], Mesh())
    observers.at_start(START)
    observers.check(0)
    observers.after_step(STEP)
    observers.after_step(STEP)
    assert calls.count("a.after_step") == 1 and calls.count("b.after_step") == 2
    with pytest.raises(
        Exception, match=r"test_observers:Watching failed at step 3: OSError: a is full .*step 4 is saved"
    ):
        observers.check(4)
    with pytest.raises(ObserverError, match="a is full"):
        Observers([Watching("a", calls, "at_start")], Mesh()).at_start(START)


def test_the_last_call_reaches_every_observer(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a watchdog or a file that stays open because another observer has failed at the end."""
    for end in (ENDED, RunEnd.by(ValueError("the run's own error"), 5, 5)):
        calls: list[str] = []
        observers = Observers([Watching("a", calls, "at_end"), Watching("b", calls)], Mesh())
        observers.at_start(START)
        calls.clear()
        if end.error is None:
            with pytest.raises(ObserverError, match="a is full"):
                observers.at_end(end)
        else:
            observers.at_end(end)  # its own error is the one to report
            assert "a is full" in capsys.readouterr().out
        assert calls == ["a.at_end", "b.at_end"]
    calls = []
    Observers([Watching("a", calls), Essential("b", calls)], Mesh()).at_end(ENDED)
    assert calls == ["b.at_end"], "nothing to end where nothing was started"


def test_an_error_of_the_loops_own_observers_is_not_the_users(tmp_path: Path) -> None:
    """Prevents the loss of another rank from being reported as the failure of an observer."""
    with pytest.raises(OSError, match="a is full"):
        Observers([Essential("a", [], "after_step")], Mesh()).after_step(STEP)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")

    class Collective(Observer):
        every_rank = True

        def at_log(self, log: LoggedStep) -> None:
            raise lost

    with pytest.raises(RuntimeError, match="Connection closed"):
        Observers([Collective()], Mesh()).at_log(LoggedStep(1, {}))


@pytest.mark.parametrize(
    ("figures", "problem"),
    [({"loss": 1.0}, "figure loss already"), ({"model": object()}, "not JSON serializable"), (None, "not iterable")],
)
def test_figures_that_cannot_be_logged(figures: Any, problem: str) -> None:
    """Prevents a user's figure that replaces the loss, and a traceback of the log that does not name the observer."""

    class Loss(Essential):
        def figures(self, end: StepEnd) -> dict[str, Any]:
            return {"loss": end.loss}

    class Users(Observer):
        def figures(self, end: StepEnd) -> Any:
            return figures

    observers = Observers([Loss("a", []), Users()], Mesh())
    assert observers.figures(STEP) == {"loss": 2.5}
    assert observers.failure is not None and problem in observers.failure and "Users" in observers.failure


def test_records_cannot_be_changed() -> None:
    """Prevents an observer from changing what the loop or a later observer reads."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        STEP.loss = 0.0  # type: ignore[misc]


MODULE = """
from recycle_ds.training.observers import Observer
class Alarm(Observer): pass
class Everywhere(Observer): every_rank = True
class Needy(Observer):
    def __init__(self, address): pass
class Other: pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module."""
    (tmp_path / "my_watchers.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_watchers", raising=False)
    return "my_watchers"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("my_watchers", "'my_watchers' must be module:Class"),
        ("my_watchers:", "must be module:Class"),
        ("my_watchers:Alarm()", "must be module:Class"),
        ("no_such_module:Alarm", "cannot be imported (ModuleNotFoundError"),
        ("my_broken:Alarm", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("my_watchers:Alam", "my_watchers:Alam does not exist"),
        ("my_watchers:Other", "is no subclass of recycle_ds.training.observers.Observer"),
    ],
)
def test_wrong_names_are_one_line(module: str, name: str, problem: str) -> None:
    """Prevents a traceback, or an hour of training, before a wrong name of an observer is found."""
    with pytest.raises(ConfigError) as error:
        observer_class(name)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_observers_of_a_configuration(module: str, tmp_path: Path) -> None:
    """Prevents an observer of rank 0 that every rank creates, and a class or another object that is passed for an observer."""
    training = tiny_run(tmp_path, tmp_path, training__observers=[f"{module}:Alarm", f"{module}:Everywhere"]).training
    given = Watching("given", [])
    check_observers(training, [given])
    assert [type(one).__name__ for one in users_observers(training, [given], first=True)] == [
        *("Alarm", "Everywhere"),
        "Watching",
    ]
    assert [type(one).__name__ for one in users_observers(training, [], first=False)] == ["Everywhere"]
    with pytest.raises(ConfigError, match=r"add \(\) to it"):
        check_observers(training, [Watching])
    needy = tiny_run(tmp_path, tmp_path, training__observers=[f"{module}:Needy"]).training
    with pytest.raises(ConfigError, match="my_watchers:Needy cannot be created without arguments"):
        users_observers(needy, [], first=True)


def test_weights_and_biases_is_asked_for_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a run that starts without the log that it should have, also beside a folder `wandb` of earlier logs."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    training = tiny_run(tmp_path, tmp_path, training__wandb="speech").training
    with pytest.raises(
        ConfigError, match=r"training\.wandb=speech needs the package wandb, which is not installed: pip"
    ):
        check_observers(training)


def test_the_documented_example_does_what_it_says(tmp_path: Path) -> None:
    """Prevents docs/observers.md from showing an observer that stops at the wrong evaluation, or not at all."""
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "observers.md").read_text(encoding="utf-8"), re.DOTALL
    )
    names: dict[str, Any] = {"__name__": "my_observers"}
    exec(compile(example, "my_observers.py", "exec"), names)
    calls: list[str] = []
    observers = Observers([names["EarlyStop"](), names["StepTime"](), Watching("log", calls)], Mesh())
    observers.at_start(RunStart(tiny_run(tmp_path, tmp_path), None, 0, 9))  # type: ignore[arg-type]
    losses = [3.0, 2.0, 2.5, 2.0, 1.9, 2.0, 2.1, 2.2]
    for step, loss in enumerate(losses, start=1):
        assert not (tmp_path / "stop").exists()
        observers.after_evaluation(EvaluationEnd(step, {"eval_loss": loss}, 0.1))
    assert (tmp_path / "stop").exists() and calls[-1] == "log.at_event no_improvement"
    assert observers.figures(STEP) == {"last_step_seconds": 0.5, "log": 3} and observers.failure is None


def test_the_documented_methods_and_observers_are_those_of_the_code() -> None:
    """Prevents a method, a record's field or a built-in observer that docs/observers.md leaves out, and a wrong order."""
    text = (ROOT / "docs" / "observers.md").read_text(encoding="utf-8")
    methods = re.findall(r"^\| `([a-z_]+)` \| (?:.*)\| `(\w+)`", text, re.MULTILINE)
    assert [name for name, _ in methods] == [
        name
        for name, value in vars(Observer).items()
        if not name.startswith("_") and callable(value) and name != "report"
    ]
    for record in {kind for _, kind in methods}:
        (line,) = [line for line in text.splitlines() if f"`{record}`:" in line]
        fields = [field.name for field in dataclasses.fields(getattr(records, record))]
        assert [field for field in fields if f"`{field}`" not in line] == [], record
    listed = re.findall(r"^\| `([A-Z]\w+)` \| (all|0) \|", text, re.MULTILINE)
    source = (ROOT / "recycle_ds" / "training" / "reporting" / "observers_of_run.py").read_text(encoding="utf-8")
    for group in ("0", "all"):  # the logs of rank 0 are created in a function of their own
        calls = ["stop," if name == "StopRequest" else f"{name}(" for name, ranks in listed if ranks == group]
        places = [source.rindex(call) for call in calls]
        assert places == sorted(places)
    assert [ranks == "all" for _, ranks in listed] == [_built_in(source, name).every_rank for name, _ in listed]


def _built_in(source: str, name: str) -> type[Observer]:
    module = re.search(rf"from (\S+) import {name}$", source, re.MULTILINE)
    assert module is not None, name
    return getattr(importlib.import_module(module[1]), name)
