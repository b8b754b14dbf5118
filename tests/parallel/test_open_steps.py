"""Steps that end while the next one is computed: bad ones change nothing, whatever was launched after them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import Manifest, read_manifest
from recycle_ds.config import RunConfig
from tests.distributed import run_in_sets, run_ranks
from tests.parallel.parity import PIPELINE
from tests.parallel.ranks import Fault, run_all, run_faulty, run_taken_over
from tests.parallel.short_runs import ROLLBACK, Runs
from tests.runs import read_metrics, zero

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": zero(0)},
    "zero0_bf16": {"deepspeed": zero(0), "training__dtype": "bf16"},
    "zero1": {"deepspeed": zero(1)},
    "zero2_bf16": {"deepspeed": zero(2), "training__dtype": "bf16"},
    "zero3": {"deepspeed": zero(3)},
    "pipeline": {"deepspeed": PIPELINE, "parallel__pipeline": 2},
}
SELDOM = {"training__log_every": 100}
"""Only the first and the last step of twelve are logged."""


def run_ahead(rank: int, world_size: int, run: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of tests/parallel/ranks.py, with steps that end late, as on a GPU."""
    from recycle_ds.training import loop

    original, loop.runs_ahead = loop.runs_ahead, lambda _: True
    try:
        return run(rank, world_size, *arguments)
    finally:
        loop.runs_ahead = original


def run_all_ahead(rank: int, world_size: int, runs: list[RunConfig]) -> list[str]:
    """`run_all`, likewise."""
    return list(run_ahead(rank, world_size, run_all, runs))


def run_faulty_ahead(rank: int, world_size: int, faults: list[Fault]) -> list[str]:
    """`run_faulty`, likewise."""
    return list(run_ahead(rank, world_size, run_faulty, faults))


class OpenRuns(Runs):
    """Runs, and how they ended."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.endings: dict[str, str] = {}

    def manifest(self, name: str) -> Manifest:
        """The newest checkpoint's."""
        return read_manifest(completed(self.root / name)[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> OpenRuns:
    """Runs that end every step at once (closed/), runs that do not (open/), and runs with bad steps."""
    found = OpenRuns(tmp_path_factory.mktemp("open"))
    plain = [found.config(f"closed/{name}", **change) for name, change in LAYOUTS.items()]
    plain += [found.config("until_6", training__stop_at=6)]
    endings = run_in_sets(run_all, 2, plain)
    assert all(set(one) == {"finished", "stop_at"} for one in endings), endings
    late = [found.config(f"open/{name}", **SELDOM, **change) for name, change in LAYOUTS.items()]
    endings = run_in_sets(run_all_ahead, 2, late)
    assert all(set(one) == {"finished"} for one in endings), endings
    faults = [
        Fault(found.config(f"retry/{name}", training__nonfinite="retry", **SELDOM, **change), 5, number % 2, times=1)
        for number, (name, change) in enumerate(LAYOUTS.items())
    ]
    for kind, more in (("rollback", SELDOM), ("rollback_closed", {})):
        for name in ("zero1", "zero3", "pipeline"):
            faults.append(Fault(found.config(f"{kind}/{name}", **ROLLBACK, **more, **LAYOUTS[name]), 7, 1, times=1))
    for kind, more in (("skip", SELDOM), ("skip_closed", {})):
        faults.append(Fault(found.config(kind, training__nonfinite="skip", **more), 5, 0))
    for kind, more in (("retry_skip", SELDOM), ("retry_skip_closed", {})):
        faults.append(Fault(found.config(kind, training__nonfinite="retry", **more), 5, 1))
    faults.append(Fault(found.config("stop", **SELDOM), 7, 1))
    faults.append(Fault(found.config("asked", **SELDOM), 5, 0, times=1, stop_file=True))
    endings = run_in_sets(run_faulty_ahead, 2, faults)
    assert endings[0] == endings[1]
    found.endings = dict(zip([fault.config.run_dir for fault in faults], endings[0], strict=True))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_ending_a_step_later_changes_nothing(runs: OpenRuns, name: str) -> None:
    """Prevents an update that is lost, applied twice, or made with another learning rate or other data, where the host does not
    wait for it, and one that a bad step before it has let through."""
    closed = runs.manifest(f"closed/{name}")
    for kind in ("open", "retry"):
        manifest = runs.manifest(f"{kind}/{name}")
        assert manifest.files == closed.files, f"{kind}: weights, moments and generators, bit for bit"
        assert (manifest.step, manifest.skipped, manifest.adam_step) == (12, 0, 12)
    (event,) = runs.events(f"retry/{name}", "nonfinite")
    assert (event["step"], event["action"]) == (5, "retry")
    lines = [record["step"] for record in read_metrics(runs.root / "open" / name) if "loss" in record]
    assert lines == [1, 12], "the test needs steps that are not logged"


@pytest.mark.parametrize("name", ["rollback/zero1", "rollback/zero3", "rollback/pipeline", "skip", "retry_skip"])
def test_what_follows_a_bad_step_is_the_same(runs: OpenRuns, name: str) -> None:
    """Prevents a step launched after a bad one from leaving something behind, or its data from being left out."""
    closed = name.replace("rollback/", "rollback_closed/") if "/" in name else f"{name}_closed"
    found, expected = runs.manifest(name), runs.manifest(closed)
    assert found.files == expected.files, "bit for bit"
    assert (found.step, found.skipped, found.rollbacks) == (12, expected.skipped, expected.rollbacks)
    assert (found.next_sample, found.adam_step) == (expected.next_sample, expected.adam_step)
    for kind in ("nonfinite", "rollback"):
        mine, others = (
            [{key: value for key, value in one.items() if key != "time"} for one in runs.events(which, kind)]
            for which in (name, closed)
        )
        assert str(mine) == str(others)


def test_a_run_stops_before_a_bad_step(runs: OpenRuns) -> None:
    """Prevents a run that is saved with the update of the step that was launched after a bad one."""
    assert runs.endings[str(runs.root / "stop")].startswith("error: step 7: loss nan")
    assert runs.manifest("stop").files == runs.manifest("until_6").files
    assert runs.manifest("stop").step == 6
    summary = json.loads((runs.root / "stop" / "summary.json").read_text())
    assert (summary["sessions"][-1]["last_step"], summary["steps_run"]) == (6, 6)


def test_a_stop_request_waits_for_the_step_under_way(runs: OpenRuns) -> None:
    """Prevents a request that is found out a step later from being missed, or from losing the step that was launched."""
    assert runs.endings[str(runs.root / "asked")] == "stop file"
    assert runs.manifest("asked").step == 6
    assert runs.manifest("asked").files == runs.manifest("until_6").files


def test_a_run_is_taken_over_while_a_step_is_under_way(runs: OpenRuns) -> None:
    """Prevents a checkpoint in a folder that a later start has taken over, because this start knows of it a step later,
    and ranks that wait for one another."""
    config = runs.config("taken", **SELDOM, training__save_every=4, training__steps=1000)
    endings = run_ranks(run_ahead, 2, run_taken_over, config, "step", timeout=120)
    assert all(ending.startswith("taken over: ") for ending in endings)
    assert [path.name for path in completed(runs.root / "taken")] == ["step-00000004"]
    assert not list((runs.root / "taken" / "checkpoints").glob(".tmp-*"))
    summary = json.loads((runs.root / "taken" / "summary.json").read_text())
    assert summary["state"] == "running", "the earlier start must not write it"
