"""Bad steps on one of two ranks: all ranks respond in the same way, and the results equal those without bad steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import read_manifest
from tests.distributed import run_in_sets, run_ranks
from tests.parallel.parity import PIPELINE
from tests.parallel.ranks import Fault, run_all, run_and_read_timeouts, run_faulty, run_taken_over
from tests.parallel.short_runs import ROLLBACK, Runs
from tests.runs import figures, steps_of, zero

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": zero(0)},
    "zero1": {"deepspeed": zero(1)},
    "zero2_bf16": {"deepspeed": zero(2), "training__dtype": "bf16"},
    "zero3": {"deepspeed": zero(3)},
    "pipeline": {"deepspeed": PIPELINE, "parallel__pipeline": 2},
    "tensor_sequence": {"deepspeed": zero(1), "parallel__tensor": 2, "parallel__sequence": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Folders clean/LAYOUT, retry/LAYOUT and rollback/LAYOUT, and single runs by name."""
    found = Runs(tmp_path_factory.mktemp("faults"))
    clean = [found.config(f"clean/{name}", **change) for name, change in LAYOUTS.items()]
    assert run_in_sets(run_all, 2, clean) == [["finished"] * len(LAYOUTS)] * 2
    retries = [
        Fault(found.config(f"retry/{name}", training__nonfinite="retry", **change), 5, number % 2, times=1)
        for number, (name, change) in enumerate(LAYOUTS.items())
    ]
    rollbacks = [
        Fault(found.config(f"rollback/{name}", **ROLLBACK, **LAYOUTS[name]), 7, 1, times=1)
        for name in ("zero1", "zero3", "pipeline")
    ]
    twice = Fault(found.config("twice", training__nonfinite="retry"), 5, 0, times=2)
    endless = Fault(found.config("endless", **ROLLBACK, faults__max_rollbacks=2), 7, 0)
    early = Fault(found.config("early", **ROLLBACK), 2, 0, times=1)
    asked = Fault(found.config("asked"), 5, 0, times=1, stop_file=True)
    faults = [*retries, *rollbacks, twice, endless, early, asked]
    endings = run_in_sets(run_faulty, 2, faults)
    assert endings[0] == endings[1]
    found.endings = dict(zip([fault.config.run_dir for fault in faults], endings[0], strict=True))  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_retried_transient_fault_changes_nothing(runs: Runs, name: str) -> None:
    """Prevents a retry that changes weights, moments, Adam's step or the position in the data."""
    assert figures(runs.root / "retry" / name) == figures(runs.root / "clean" / name), "bit for bit"
    (event,) = runs.events(f"retry/{name}", "nonfinite")
    assert (event["step"], event["action"]) == (5, "retry")
    left, right = (completed(runs.root / kind / name)[0] for kind in ("retry", "clean"))
    assert read_manifest(left).files["rng-00000.safetensors"] == read_manifest(right).files["rng-00000.safetensors"]
    assert (read_manifest(left).skipped, read_manifest(left).adam_step) == (0, 12)


def test_a_persistent_fault_is_skipped(runs: Runs) -> None:
    """Prevents a bad batch from being retried forever."""
    assert [event["action"] for event in runs.events("twice", "nonfinite")] == ["retry", "skip"]
    manifest = read_manifest(completed(runs.root / "twice")[0])
    assert (manifest.step, manifest.skipped, manifest.adam_step, manifest.next_sample) == (12, 1, 11, 96)


@pytest.mark.parametrize("name", ["zero1", "zero3", "pipeline"])
def test_a_rollback_resumes_from_the_checkpoint_with_other_data(runs: Runs, name: str) -> None:
    """Prevents a rollback that keeps moments or weights of undone steps, reads their data again, or omits a rank."""
    found, clean = figures(runs.root / "rollback" / name), figures(runs.root / "clean" / name)
    assert len(found) == 12 and found[:4] == clean[:4] and found[4] != pytest.approx(clean[4], rel=1e-4)
    (event,) = runs.events(f"rollback/{name}", "rollback")
    assert (event["step"], event["from_step"], event["samples"]) == (4, 7, 24)
    manifest = read_manifest(completed(runs.root / "rollback" / name)[0])
    assert (manifest.step, manifest.rollbacks, manifest.next_sample, manifest.adam_step) == (12, 1, 120, 12)
    # all layouts continue with equal figures; anything left of the undone steps would change them
    for left, right in zip(found, figures(runs.root / "rollback" / "zero1"), strict=True):
        assert left == pytest.approx(right, rel=1e-5)


def test_a_rollback_equals_a_run_started_from_the_checkpoint(runs: Runs) -> None:
    """Prevents results after a rollback that are close to the correct ones, but not equal."""
    import shutil

    from recycle_ds.checkpoint.portable.manifest import write_manifest

    again = runs.root / "again"
    shutil.copytree(runs.root / "clean" / "zero1", again)
    shutil.rmtree(again / "checkpoints")
    source = runs.root / "rollback" / "zero1" / "checkpoints" / "step-00000004"
    target = again / "checkpoints" / "step-00000004"
    shutil.copytree(source, target)
    tree = json.loads((target / "manifest.json").read_text())
    write_manifest(target, {key: value for key, value in tree.items() if key != "digest"} | {"next_sample": 56})
    config = runs.config("again", **ROLLBACK, **LAYOUTS["zero1"])
    assert run_ranks(run_all, 2, [config], timeout=120) == [["finished"]] * 2
    assert figures(again)[4:] == figures(runs.root / "rollback" / "zero1")[4:], "bit for bit"


def test_rollbacks_are_limited(runs: Runs) -> None:
    """Prevents endless rollbacks to the same checkpoint, and a rollback without a checkpoint."""
    ending = runs.endings[str(runs.root / "endless")]  # type: ignore[attr-defined]
    assert ending.startswith("error: step 7: loss nan") and "training.nonfinite=skip" in ending
    assert [event["from_step"] for event in runs.events("endless", "rollback")] == [7, 7]
    assert [event["action"] for event in runs.events("early", "nonfinite")] == ["skip"]
    assert runs.endings[str(runs.root / "early")] == "finished"  # type: ignore[attr-defined]


def test_a_stop_file_stops_one_run(runs: Runs) -> None:
    """Prevents a stop request that is missed, or that stops every later start as well."""
    assert runs.endings[str(runs.root / "asked")] == "stop file"  # type: ignore[attr-defined]
    assert completed(runs.root / "asked")[0].name == "step-00000005"
    assert not (runs.root / "asked" / "stop").exists()
    (runs.root / "asked" / "stop").touch()  # left over from an earlier start
    assert run_ranks(run_all, 2, [runs.config("asked")], timeout=120) == [["finished"]] * 2
    assert figures(runs.root / "asked") == figures(runs.root / "clean" / "zero1")


def test_a_resumed_run_judges_spikes_as_the_uninterrupted_one(runs: Runs) -> None:
    """Prevents a spike right after a restart from being applied because the history was lost."""
    change: dict[str, Any] = {"training__steps": 24, "faults__spike": "skip", "faults__spike_window": 16}
    uninterrupted, resumed = (runs.config(f"judged/{name}", **change) for name in ("whole", "parts"))
    first = runs.config("judged/parts", **change, training__stop_at=20)
    faults = [Fault(uninterrupted, 22, 1, 1, 40.0), Fault(first, 30, 0), Fault(resumed, 22, 1, 1, 40.0)]
    assert run_ranks(run_faulty, 2, faults, timeout=200) == [["finished", "stop_at", "finished"]] * 2
    assert figures(runs.root / "judged/parts") == figures(runs.root / "judged/whole")
    for name in ("whole", "parts"):
        (event,) = runs.events(f"judged/{name}", "loss_spike")
        assert (event["step"], event["action"]) == (22, "skip") and event["score"] > 10
    assert len(steps_of(runs.root / "judged/parts")) == 24


@pytest.mark.parametrize("moment", ["step", "publish", "cleanup", "writing"])
def test_a_run_that_is_taken_over_does_not_touch_the_folder(runs: Runs, moment: str) -> None:
    """Prevents a start from replacing files of the start that took over its folder, and ranks that wait forever."""
    config = runs.config(f"taken/{moment}", training__save_every=2, training__steps=1000)
    ending, other = run_ranks(run_taken_over, 2, config, moment, timeout=120)
    assert ending.startswith(f"taken over: {config.run_dir} has been taken over by process 1 on elsewhere (job 8)")
    assert other.startswith("taken over: ")
    folder = Path(config.run_dir)
    assert [path.name for path in completed(folder)] == ["step-00000002"]
    assert not list((folder / "checkpoints").glob(".tmp-*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "running" and summary["anomalies"] == {}, "the earlier start must not write it"
    assert "released" not in (folder / ".lock").read_text()


def test_collective_timeouts_are_shorter_after_the_first_step(runs: Runs) -> None:
    """Prevents ranks from waiting six hours for a dead rank, and from timing out while another rank saves slowly."""
    found = run_ranks(run_and_read_timeouts, 2, runs.config("timeouts", faults__hang_timeout=50.0), timeout=120)
    assert found[0] and {seconds for rank in found for seconds in rank} == {4 * 50 + 60}
