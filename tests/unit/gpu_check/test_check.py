"""The check behind `make gpu`, with parts of every kind of end, and real ones rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from recycle_ds.config import ConfigError
from recycle_ds.gpu_check.check import part_environment, run_check
from recycle_ds.gpu_check.part import FAILED, NOT_RUN, PASSED, TIMED_OUT, Part
from recycle_ds.gpu_check.parts import BENCHES, NEEDED, CheckSettings, all_parts, fitted
from tests.runs import ROOT

TESTS = """
import subprocess, sys, time

def test_good():
    pass

def test_hangs(tmp_path):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "left-by-the-hang"])
    time.sleep(600)

def test_after():
    pass
"""
FAILS = """
def test_good(tmp_path):
    (tmp_path / "file").write_text("x")

def test_bad():
    assert 1 + 1 == 3, "the reason"

def test_needs(fixture):
    pass
"""
FIGURES = """
import json, sys, time
with open(sys.argv[1], "a") as out:
    out.write(json.dumps({"figures": {"first": 1.5}}) + "\\n")
    out.flush()
    time.sleep(float(sys.argv[2]))
    out.write(json.dumps({"figures": {"second": 2}}) + "\\n")
"""


def part(folder: Path, name: str, source: str, seconds: float = 60.0) -> Part:
    """A part of test functions, from source below a folder of modules."""
    file = folder / f"{name}_file.py"
    file.write_text(source, encoding="utf-8")
    results = folder / "parts" / f"{name}.jsonl"
    command = ("-m", "recycle_ds.gpu_check.functions", str(file.name), str(results))
    code = f"import os, runpy, sys; os.chdir({str(folder)!r}); sys.argv = ['functions', *{list(command[2:])!r}]; "
    return Part(
        name, ("-c", code + "runpy.run_module('recycle_ds.gpu_check.functions', run_name='__main__')"), results, seconds
    )


def bench(folder: Path, name: str, sleep: float, seconds: float) -> Part:
    """A part that writes a figure, sleeps and writes another one."""
    results = folder / "parts" / f"{name}.jsonl"
    return Part(name, ("-c", FIGURES, str(results), str(sleep)), results, seconds, alone=True)


def settings(folder: Path, **changes: Any) -> CheckSettings:
    values: dict[str, Any] = {"run_dir": folder / "run", "device": "cpu", "minutes": 3.0, "jobs": 3}
    return CheckSettings(**(values | changes))


def test_every_end_of_a_part_is_reported(tmp_path: Path) -> None:
    """Prevents a hang that loses the results of others or its own, failures without their reason, figures that are lost when a
    bench is cut off, and processes that a killed part leaves behind."""
    parts = [
        part(tmp_path, "hangs", TESTS, seconds=8.0),
        part(tmp_path, "fails", FAILS),
        Part(
            "crashes", ("-c", "import os; print('last words', flush=True); os._exit(9)"), tmp_path / "crash.jsonl", 60.0
        ),
        bench(tmp_path, "whole", 0.0, 60.0),
        bench(tmp_path, "cut", 600.0, 2.0),
    ]
    passed = run_check(settings(tmp_path), ROOT, {"name": "a machine"}, parts=parts)
    assert not passed
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["complete"] and report["rehearsal"]
    states = {name: one["state"] for name, one in report["parts"].items()}
    assert states == {"hangs": TIMED_OUT, "fails": FAILED, "crashes": FAILED, "whole": PASSED, "cut": TIMED_OUT}
    tests = {name: {t["name"]: t["state"] for t in one["tests"]} for name, one in report["parts"].items()}
    assert tests["hangs"] == {"test_good": PASSED, "test_hangs": TIMED_OUT, "test_after": NOT_RUN}
    assert tests["fails"] == {"test_good": PASSED, "test_bad": FAILED, "test_needs": FAILED}
    assert report["figures"] == {"whole": {"first": 1.5, "second": 2}, "cut": {"first": 1.5}}
    text = (tmp_path / "run" / "report.md").read_text()
    for shown in (
        "AssertionError: the reason",
        "only tmp_path can be given",
        "last words",
        "rehearsal",
    ):
        assert shown in text or shown in "\n".join(report["parts"]["hangs"]["output"]), shown
    assert any("in test_hangs" in line for line in report["parts"]["hangs"]["output"]), "no stack of the hang"
    left = [one for one in psutil.process_iter(["cmdline"]) if "left-by-the-hang" in (one.info["cmdline"] or [])]
    assert left == []


def test_time_that_is_up_ends_every_part(tmp_path: Path) -> None:
    """Prevents a check beyond its minutes, tests that use up the time of the benches, and one without a report."""
    start = time.monotonic()
    parts = [*(bench(tmp_path, f"slow{n}", 600.0, 600.0) for n in range(2)), bench(tmp_path, "last", 600.0, 600.0)]
    slow = Part("tests", ("-c", "import time; time.sleep(600)"), tmp_path / "tests.jsonl", 600.0)
    assert not run_check(settings(tmp_path, minutes=0.2), ROOT, {"name": "a machine"}, parts=[slow, *parts])
    assert time.monotonic() - start < 60
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    states = [one["state"] for one in report["parts"].values()]
    assert states[:2] == [TIMED_OUT, TIMED_OUT] and set(states[2:]) <= {TIMED_OUT, NOT_RUN}
    assert report["parts"]["tests"]["seconds"] < 0.6 * 60 * 0.2 + 3


def test_a_report_is_there_before_the_end(tmp_path: Path) -> None:
    """Prevents the loss of all results when the check itself is killed, and parts that outlive Ctrl-C."""
    seen: list[bool] = []

    def say(text: str) -> None:
        if text.startswith("quick"):
            seen.append(json.loads((tmp_path / "run" / "report.json").read_text())["complete"])
            raise KeyboardInterrupt

    slow = Part("slow", ("-c", "import time; time.sleep(600)", "outlives"), tmp_path / "slow.jsonl", 600.0)
    quick = Part("quick", ("-c", "pass"), tmp_path / "quick.jsonl", 60.0)
    with pytest.raises(KeyboardInterrupt):
        run_check(settings(tmp_path), ROOT, {"name": "a machine"}, parts=[slow, quick], say=say)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert seen == [False] and report["parts"]["quick"]["state"] == PASSED
    assert not [one for one in psutil.process_iter(["cmdline"]) if "outlives" in (one.info["cmdline"] or [])]


def test_parts_see_only_the_device_that_is_asked_for(tmp_path: Path) -> None:
    """Prevents a rehearsal that finds a GPU, ranks of a surrounding job, and benches with costs measured beside tests."""
    before = {"CUDA_VISIBLE_DEVICES": "0", "WORLD_SIZE": "8", "RANK": "3", "PYTHONPATH": "/elsewhere"}
    os.environ.update(before)
    try:
        found = part_environment(settings(tmp_path), ROOT, tmp_path, "tests", 2)
        own = part_environment(settings(tmp_path, device="cuda"), ROOT, tmp_path, "benches", 1)
    finally:
        for name in before:
            os.environ.pop(name)
    assert (found["CUDA_VISIBLE_DEVICES"], found["RECYCLE_GPU_DEVICE"], found["DS_ACCELERATOR"]) == ("", "cpu", "cpu")
    assert (own["CUDA_VISIBLE_DEVICES"], own["RECYCLE_GPU_DEVICE"], own["DS_ACCELERATOR"]) == ("0", "cuda", "cuda")
    assert "WORLD_SIZE" not in found and found["PYTHONPATH"] == f"{ROOT}:/elsewhere"
    assert found["XDG_CACHE_HOME"] != own["XDG_CACHE_HOME"]


def test_every_file_of_tests_gpu_is_a_part(tmp_path: Path) -> None:
    """Prevents tests for GPUs that `make gpu` does not run, and names that are silently ignored."""
    names = [one.name for one in all_parts(settings(tmp_path, device="cuda"), ROOT)]
    files = sorted(file.stem.removeprefix("test_") for file in (ROOT / "tests" / "gpu").glob("test_*.py"))
    benches = [f"bench_{name}" for name in BENCHES if name not in NEEDED]
    assert sorted(names[: len(files)]) == files and names[len(files) :] == benches and len(files) > 5
    assert names[:4] == ["zero", "memory_savers", "compiled", "decoding_graphs"], "the longest would end last"
    assert len(set(names)) == len(names), "one part would replace another's results"
    assert [one.name for one in all_parts(settings(tmp_path, only=("engine",)), ROOT)] == ["engine"]
    with pytest.raises(ConfigError, match="--only engin: no such part; they are zero"):
        all_parts(settings(tmp_path, only=("engin",)), ROOT)
    with pytest.raises(ConfigError, match="run this in a clone"):
        all_parts(settings(tmp_path), tmp_path)
    rehearsed = [one.name for one in all_parts(settings(tmp_path, device="cpu"), ROOT)]
    assert rehearsed[len(files) :] == [f"bench_{name}" for name in BENCHES], "without the package, too"
    with pytest.raises(ConfigError, match="--only bench_kernels: it compares with liger-kernel: install it"):
        all_parts(settings(tmp_path, device="cuda", only=("bench_kernels",)), ROOT)
    for wrong in ({"minutes": 0.0}, {"jobs": 0}):
        with pytest.raises(ConfigError, match="must be"):
            settings(tmp_path, **wrong)


def test_limits_of_benches_fit_their_time(tmp_path: Path) -> None:
    """Prevents benches that hang and so leave no time for those after them, and limits beyond a part's own."""
    benches = [one for one in all_parts(settings(tmp_path, device="cuda"), ROOT) if one.alone]
    least = [one.seconds for one in fitted(benches, 200.0)]
    assert sum(least) == pytest.approx(200.0) and min(least) > 20
    assert least[1] / least[0] == pytest.approx(BENCHES["training"] / BENCHES["machine"])
    assert fitted(benches, 1000.0) == benches and sum(one.seconds for one in fitted(benches, -1.0)) == 0
    assert fitted([], 10.0) == []


def test_real_parts_are_rehearsed(tmp_path: Path) -> None:
    """Prevents a command that does not start its parts, tests that run on a GPU only by chance, and a bench without figures."""
    command = [
        "make", f"PYTHON={sys.executable}", "gpu",
        f"ARGS=--device cpu --only engine,bench_machine --run-dir {tmp_path} --jobs 1 --minutes 8",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: one["state"] for name, one in report["parts"].items()} == dict.fromkeys(
        ("engine", "bench_machine"), PASSED
    )
    assert report["figures"]["machine"]["matmul_fp32"] > 0
    assert "A rehearsal on a CPU" in done.stdout and "not measured" in done.stdout and "borne out |" not in done.stdout


def test_without_a_gpu_it_says_so() -> None:
    """Prevents a traceback, or a check on the CPU that passes for one on a GPU."""
    command = ["make", f"PYTHON={sys.executable}", "gpu"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert lines == ["error: make gpu needs a CUDA GPU, and PyTorch finds none; --device cpu rehearses it on a CPU"]
