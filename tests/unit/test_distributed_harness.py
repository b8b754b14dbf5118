"""The harness for tests with several ranks. If it lost a failure or a process, those tests would prove nothing.

torch is imported only in the functions that use it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import RankError, RankTimeout, run_ranks


class Odd(Exception):
    """An exception that pickle cannot rebuild: its constructor needs more arguments than `args` contains."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"{number}: {reason}")


def _describe(rank: int, world_size: int, word: str) -> tuple[int, int, str, str, str]:
    time.sleep(0.2 * (world_size - rank))  # the last rank ends first
    return rank, world_size, word, os.environ["RANK"], os.environ["OMP_NUM_THREADS"]


def _sum(rank: int, world_size: int) -> Any:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    return total


def _fail_on_one(rank: int, world_size: int, failing: int, folder: str) -> None:
    """All ranks but one wait in a collective that never completes."""
    import torch.distributed as dist

    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    dist.init_process_group("gloo")
    if rank == failing:
        while len(list(Path(folder).iterdir())) < world_size:
            time.sleep(0.01)
        raise KeyError("the reason")
    dist.barrier()


def _raise_odd(rank: int, world_size: int) -> None:
    raise Odd(rank, "the odd reason")


def _exit_on_rank_1(rank: int, world_size: int, code: int) -> None:
    if rank == 1:
        os._exit(code)
    time.sleep(60)


def _hang_in_here(rank: int, world_size: int, folder: str) -> None:
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(600)


def _return_a_generator(rank: int, world_size: int) -> Any:
    return (number for number in range(3))


def _alive(folder: Path) -> list[int]:
    pids = [int(file.read_text()) for file in folder.glob("pid-*")]
    assert pids
    return [pid for pid in pids if Path("/proc", str(pid)).exists()]


@pytest.mark.ranks
def test_results_come_back_in_the_order_of_ranks() -> None:
    """Prevents results in the order in which ranks end, with which parity tests would compare the wrong shards."""
    assert run_ranks(_describe, 3, "word") == [(rank, 3, "word", str(rank), "1") for rank in range(3)]


@pytest.mark.ranks
def test_ranks_can_form_a_group_and_return_tensors() -> None:
    """Prevents missing variables for the rendezvous: they must be sufficient for torch's own `env://`."""
    assert [result.item() for result in run_ranks(_sum, 2)] == [3.0, 3.0]


@pytest.mark.ranks
def test_the_failing_rank_is_raised_and_its_peers_are_ended(tmp_path: Path) -> None:
    """Prevents a report of another rank's "connection closed" instead of the cause, and ranks that wait forever."""
    with pytest.raises(KeyError, match="the reason") as caught:
        run_ranks(_fail_on_one, 2, 1, str(tmp_path))
    assert isinstance(caught.value.__cause__, RankError)
    assert "rank 1 of 2" in str(caught.value.__cause__)
    assert "_fail_on_one" in str(caught.value.__cause__)
    assert _alive(tmp_path) == []


@pytest.mark.ranks
def test_an_exception_that_pickle_cannot_rebuild_is_reported_by_its_traceback() -> None:
    """Prevents a lost cause, or an error of pickle, for an exception with an unusual constructor."""
    with pytest.raises(RankError, match="the odd reason"):
        run_ranks(_raise_odd, 1)


@pytest.mark.ranks
@pytest.mark.parametrize(("code", "message"), [(7, "rank 1 exited with code 7"), (0, r"ranks \[1\] exited without")])
def test_a_rank_that_exits_without_a_result_is_an_error(code: int, message: str) -> None:
    """Prevents a passing test whose rank crashed in native code, or called exit, before it compared anything."""
    with pytest.raises(RankError, match=message):
        run_ranks(_exit_on_rank_1, 2, code)


@pytest.mark.ranks
def test_a_hang_times_out_with_its_stack_and_leaves_no_process(tmp_path: Path) -> None:
    """Prevents a deadlock from blocking the test suite, and from being reported without the line where it hangs."""
    with pytest.raises(RankTimeout, match="_hang_in_here"):
        run_ranks(_hang_in_here, 2, str(tmp_path), timeout=10)
    assert _alive(tmp_path) == []


@pytest.mark.ranks
def test_a_result_that_cannot_be_pickled_is_an_error() -> None:
    """Prevents a rank that fails while it returns its result from counting as successful."""
    with pytest.raises((RankError, TypeError), match="generator"):
        run_ranks(_return_a_generator, 1)


def test_a_function_that_ranks_cannot_import_is_refused() -> None:
    """Prevents separate errors of all ranks for a local function that they cannot import."""
    with pytest.raises(Exception, match=r"[Cc]an't (get|pickle)|local object"):
        run_ranks(lambda rank, world_size: rank, 1)
