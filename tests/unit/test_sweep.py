"""slurm/sweep.sbatch with a stub for slurm/common.sh: which run a task trains, and which task prints the summary."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Prints the command that a job would run, and ends as $ENDS requests: exit code 0 or 1, or requeued.
_COMMON = """
cd "$SLURM_SUBMIT_DIR"
RUNS_DIR=runs JOB_DIR=job
fail() { echo "error: $*" >&2; exit 2; }
run_tool() { echo "summary: $*"; }
run_and_requeue() {
    echo "runs: $*"
    [[ $ENDS != requeued ]] || { requeued=1; exit 75; }
    exit "$ENDS"
}
"""


class Sweep:
    """Tasks of arrays over one list of runs."""

    def __init__(self, root: Path, name: str, text: str) -> None:
        (root / "slurm").mkdir()
        shutil.copy(ROOT / "slurm" / "sweep.sbatch", root / "slurm")
        (root / "slurm" / "common.sh").write_text(_COMMON)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        self.root, self.name = root, name

    def task(self, number: int, count: int, *, array: str = "7", ends: str = "0") -> tuple[str, str]:
        """Runs a task to its end; returns its stdout and stderr."""
        done = subprocess.run(
            ["bash", "slurm/sweep.sbatch", self.name, "--config", "c.yaml"],
            capture_output=True, text=True, cwd=self.root, timeout=60, check=False,
            env=os.environ | {
                "SLURM_SUBMIT_DIR": str(self.root), "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": str(number),
                "SLURM_ARRAY_TASK_COUNT": str(count), "ENDS": ends,
            },
        )  # fmt: skip
        assert done.returncode == {"0": 0, "1": 1, "requeued": 75}[ends] or done.returncode == 2, done.stderr
        return done.stdout, done.stderr


LIST = "# name, changes\none training.seed=1 training.steps=3\n\n  two\nthree training.seed=3\n"
SUMMARY = "summary: tools/summarise_runs.py runs/list/one runs/list/two runs/list/three"


def test_a_task_runs_its_line(tmp_path: Path) -> None:
    """Prevents a run with the settings of another line, or without its own."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    expected = "runs: recycle_ds.pretrain --config c.yaml run_dir=runs/list/one training.seed=1 training.steps=3\n"
    assert sweep.task(1, 3)[0] == expected
    assert sweep.task(2, 3)[0] == "runs: recycle_ds.pretrain --config c.yaml run_dir=runs/list/two\n"


def test_the_last_task_to_end_prints_the_summary(tmp_path: Path) -> None:
    """Prevents a summary before a requeued run has ended, no summary at the end, and a summary for each failed task."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    for number, ends in ((2, "1"), (1, "requeued"), (3, "0"), (1, "requeued")):
        assert "summary" not in sweep.task(number, 3, ends=ends)[0]
    assert sweep.task(1, 3)[0].splitlines()[-1] == SUMMARY


def test_a_restarted_task_has_not_ended(tmp_path: Path) -> None:
    """Prevents a summary while a restarted task still runs, and a missing summary when the task ends again."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    sweep.task(1, 3)
    sweep.task(1, 3, ends="requeued")
    sweep.task(2, 3)
    assert "summary" not in sweep.task(3, 3)[0], "the first task was requeued"
    assert SUMMARY in sweep.task(1, 3)[0]
    sweep.task(2, 3, ends="requeued")
    assert SUMMARY in sweep.task(2, 3)[0], "a second restart"


def test_an_array_over_some_lines_is_complete(tmp_path: Path) -> None:
    """Prevents a missing summary after one failed run is repeated, and marks of an earlier array from being counted."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    assert SUMMARY in sweep.task(3, 1)[0]
    assert (tmp_path / "runs" / "list" / "one").is_dir(), "a run that was never started is in the summary too"
    assert "summary" not in sweep.task(1, 2, array="8")[0]
    assert SUMMARY in sweep.task(3, 2, array="8")[0]


def test_a_number_without_a_run_does_not_prevent_the_summary(tmp_path: Path) -> None:
    """Prevents a missing summary with `--array=1-4` over three runs, where the fourth task fails."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    out, err = sweep.task(4, 2)
    assert out == "" and err == "error: array task 4: list.txt has 3 runs; submit with --array=1-3\n"
    assert SUMMARY in sweep.task(1, 2)[0]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("exp.v2/list", "list"), ("../lists/sweep", "sweep"), ("a/b.c.txt", "b.c"), ("plain.txt", "plain")],
)
def test_the_folder_has_the_name_of_the_list(tmp_path: Path, name: str, folder: str) -> None:
    """Prevents two lists from sharing a folder because a dot in a folder's name was treated as a file suffix."""
    (tmp_path / "here").mkdir()
    out, _ = Sweep(tmp_path / "here", name, "one\n").task(1, 1)
    assert out.splitlines()[0].endswith(f" run_dir=runs/{folder}/one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ngroup/two\n", "run group/two: a name must not contain / or start with ."),
        ("one\n..\n", "run ..: a name must not contain / or start with ."),
        ("one\ntwo\none training.seed=2\n", "two runs are called one: they would share a folder"),
        ("# nothing\n", "contains no runs: write one per line, a name and its settings"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Prevents a task that fails only at its end, when it writes its mark, and two tasks that share a folder."""
    assert Sweep(tmp_path, "list.txt", text).task(1, 1) == ("", f"error: list.txt: {message}\n")


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    """Prevents a wrong path from being reported as a list without runs."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    sweep.name = "missing.txt"
    assert sweep.task(1, 1) == ("", "error: missing.txt: cannot be read: name the file with the runs\n")


def test_the_error_of_a_run_is_in_its_folder(tmp_path: Path) -> None:
    """Prevents a run that could not start from having no error message, and a fixed run from keeping its message."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "error").write_text("training.stps: unknown key\n")
    sweep.task(2, 1, ends="1")
    error = tmp_path / "runs" / "list" / "two" / "error.txt"
    assert error.read_text() == "training.stps: unknown key\n"
    (tmp_path / "job" / "error").unlink()
    sweep.task(2, 1)
    assert not error.exists()


@pytest.mark.parametrize("file", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda file: file.name)
def test_a_batch_file_outside_sbatch_says_so(file: Path) -> None:
    """Prevents `bash slurm/x.sbatch` from ending with nothing but an unbound variable."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(["bash", str(file)], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode != 0 and "submit this file with sbatch, from the root of the repository" in done.stderr
