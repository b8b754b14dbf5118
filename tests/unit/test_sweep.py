"""slurm/sweep.sbatch, with what it shares with the other files replaced: which run a task is, and who sums up."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A job that says what it would run, and that ENDS as its task is told: 0, 1, or requeued.
_COMMON = """
cd "$SLURM_SUBMIT_DIR"
RUNS_DIR=runs JOB_DIR=job
fail() { echo "error: $*" >&2; exit 2; }
alone() { echo "sums up: $*"; }
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
        """Runs a task to its end; its stdout and stderr."""
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
SUMMARY = "sums up: tools/summarise_runs.py runs/list/one runs/list/two runs/list/three"


def test_a_task_is_a_line(tmp_path: Path) -> None:
    """A run with another's settings, or without its own."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    expected = "runs: recycle_ds.pretrain --config c.yaml run_dir=runs/list/one training.seed=1 training.steps=3\n"
    assert sweep.task(1, 3)[0] == expected
    assert sweep.task(2, 3)[0] == "runs: recycle_ds.pretrain --config c.yaml run_dir=runs/list/two\n"


def test_the_last_task_to_end_sums_up(tmp_path: Path) -> None:
    """A summary while a run that was requeued still goes on, or none when it has ended; one for every failed task."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    for number, ends in ((2, "1"), (1, "requeued"), (3, "0"), (1, "requeued")):
        assert "sums up" not in sweep.task(number, 3, ends=ends)[0]
    assert sweep.task(1, 3)[0].splitlines()[-1] == SUMMARY


def test_a_task_that_starts_again_has_not_ended(tmp_path: Path) -> None:
    """The last word on a sweep said while a task is back that SLURM started again after its end, or never said again."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    sweep.task(1, 3)
    sweep.task(1, 3, ends="requeued")
    sweep.task(2, 3)
    assert "sums up" not in sweep.task(3, 3)[0], "the first one is to come back"
    assert SUMMARY in sweep.task(1, 3)[0]
    sweep.task(2, 3, ends="requeued")
    assert SUMMARY in sweep.task(2, 3)[0], "and once more"


def test_a_part_of_the_list_is_an_array_of_its_own(tmp_path: Path) -> None:
    """No summary after the one run that was mended; or marks of an array before taken for those of this one."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    assert SUMMARY in sweep.task(3, 1)[0]
    assert (tmp_path / "runs" / "list" / "one").is_dir(), "a run that has not begun is summed up as such"
    assert "sums up" not in sweep.task(1, 2, array="8")[0]
    assert SUMMARY in sweep.task(3, 2, array="8")[0]


def test_a_number_without_a_run_holds_up_no_summary(tmp_path: Path) -> None:
    """`--array=1-4` over three runs: the fourth task fails, and nobody ever sums up."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    out, err = sweep.task(4, 2)
    assert out == "" and err == "error: array task 4: list.txt has 3 runs; submit with --array=1-3\n"
    assert SUMMARY in sweep.task(1, 2)[0]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("exp.v2/list", "list"), ("../lists/sweep", "sweep"), ("a/b.c.txt", "b.c"), ("plain.txt", "plain")],
)
def test_the_folder_is_called_like_the_list(tmp_path: Path, name: str, folder: str) -> None:
    """Sweeps of two lists in one folder, because a dot of a folder's name was taken for the end of the list's."""
    (tmp_path / "here").mkdir()
    out, _ = Sweep(tmp_path / "here", name, "one\n").task(1, 1)
    assert out.splitlines()[0].endswith(f" run_dir=runs/{folder}/one")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one\ngroup/two\n", "run group/two: a name has no / and begins with no ."),
        ("one\n..\n", "run ..: a name has no / and begins with no ."),
        ("one\ntwo\none training.seed=2\n", "two runs are called one: they would share a folder"),
        ("# nothing\n", "no run in it: write a name and its changes on a line"),
    ],
)
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """A task that fails in its last breath, when it marks its end; or two tasks in one folder."""
    assert Sweep(tmp_path, "list.txt", text).task(1, 1) == ("", f"error: list.txt: {words}\n")


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A wrong path told as a list without runs."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    sweep.name = "lost.txt"
    assert sweep.task(1, 1) == ("", "error: lost.txt: cannot be read: name the file with the runs\n")


def test_why_a_run_failed_stands_beside_it(tmp_path: Path) -> None:
    """A run that never began and nobody knows why; or the error of the start before, which has been mended."""
    sweep = Sweep(tmp_path, "list.txt", LIST)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "error").write_text("training.stps: unknown key\n")
    sweep.task(2, 1, ends="1")
    told = tmp_path / "runs" / "list" / "two" / "error.txt"
    assert told.read_text() == "training.stps: unknown key\n"
    (tmp_path / "job" / "error").unlink()
    sweep.task(2, 1)
    assert not told.exists()
