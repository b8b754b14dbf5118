"""SLURM's variables, the batch job, and the errors of a rank that has lost a peer."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from recycle_ds.parallel.job import Job, is_error_reporter, job_of
from recycle_ds.parallel.peers import lost_peer
from recycle_ds.parallel.slurm import first_host, master_endpoint, tasks_on_host


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1"),
        ("gpu[007-012,020],login1", "gpu007"),
        ("a1,b[2-3]", "a1"),
        ("rack[3]-blade", "rack3-blade"),
        ("tux[2,5]", "tux2"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("rack[01,03]-node[007,9],login1", "rack01-node007"),
        ("login1,rack[1-2]node[3-4]", "login1"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, expected: str) -> None:
    """Prevents ranks that wait for each other at a wrong host name or at a list of hosts."""
    assert first_host(nodes) == expected


def test_the_endpoint_of_the_rendezvous() -> None:
    """Prevents two jobs on one node with the same port, and a restart that connects to ranks of the previous start."""
    job = {"SLURM_STEP_NODELIST": "node[4-5]", "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0"}
    host, port = master_endpoint(job)
    assert host == "node4" and 10_000 <= port < 30_000
    variants = [job | {"SLURM_JOB_ID": "10"}, job | {"SLURM_STEP_ID": "1"}, job | {"SLURM_RESTART_COUNT": "1"}]
    assert len({port, *(master_endpoint(variant)[1] for variant in variants)}) == 4
    assert master_endpoint(job | {"MASTER_ADDR": "ib-node4", "MASTER_PORT": "1234"}) == ("ib-node4", 1234)


def test_tasks_on_this_host() -> None:
    """Prevents a tensor group that spans two nodes because the tasks of a node were counted wrongly."""
    counts = [tasks_on_host({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": str(node)}) for node in range(4)]
    assert counts == [4, 4, 3, 0]
    assert tasks_on_host({"SLURM_STEP_TASKS_PER_NODE": "many", "SLURM_NODEID": "0"}) == 0
    assert tasks_on_host({}) == 0


def test_the_job_is_read_from_its_variables(tmp_path: Path) -> None:
    """Prevents a run without SLURM from expecting a job, and a run under SLURM from missing its end time."""
    assert job_of({}) == Job()
    variables = {"RECYCLE_JOB_DIR": str(tmp_path), "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"}
    job = job_of(variables | {"SLURM_JOB_END_TIME": "1700000000"})
    assert job == Job(tmp_path, 1.7e9, "5", 2) and job.stop_file == tmp_path / "stop"
    assert job_of(variables | {"SLURM_JOB_END_TIME": "NONE"}).end is None
    job.write_note("outcome", "finished")
    assert [path.name for path in tmp_path.iterdir()] == ["outcome"]
    assert (tmp_path / "outcome").read_text() == "finished\n"


def test_a_note_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a run from ending because a line for the shell could not be written."""
    Job(tmp_path / "gone").write_note("outcome", "finished")
    assert "No such file" in capsys.readouterr().out


def test_a_job_is_requeued_by_its_run_only_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents two requeues of a job, by its shell and by its run, and one while its shell may still run elsewhere."""
    calls, state = tmp_path / "calls", tmp_path / "state"
    state.write_text("JobState=COMPLETING ExitCode=0:9")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("REQUEUE", "1")
    monkeypatch.setenv("RECYCLE_JOB", "30_2")
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\n[ $1 = show ] && cat {state} || echo "$@" >> {calls}\n')
    program.chmod(0o755)
    job, shell = Job(tmp_path, None, "31", 0), tmp_path / "shell"
    assert not job.requeue_if_orphaned(), "there is no record of a shell"
    shell.write_text(f"{socket.gethostname()} 1\n")
    assert not job.requeue_if_orphaned(), "process 1 runs"
    shell.write_text("elsewhere 999999999\n")
    assert not job.requeue_if_orphaned()
    shell.write_text(f"{socket.gethostname()} 999999999\n")
    monkeypatch.setenv("REQUEUE", "0")
    assert not job.requeue_if_orphaned()
    assert not calls.exists()
    monkeypatch.setenv("REQUEUE", "1")
    assert job.requeue_if_orphaned()
    assert calls.read_text() == "requeue 30_2\n"
    state.write_text("JobState=CANCELLED ExitCode=0:15")
    assert not job.requeue_if_orphaned(), "the user has cancelled it"
    program.unlink()
    assert not job.requeue_if_orphaned(), "there is no scontrol"


def test_only_one_rank_prints_errors() -> None:
    """Prevents an error that every rank prints, or that no rank prints."""
    assert (
        is_error_reporter({})
        and is_error_reporter({"RANK": "0", "SLURM_PROCID": "1"})
        and is_error_reporter({"SLURM_PROCID": "0"})
    )
    assert not is_error_reporter({"RANK": "1", "SLURM_PROCID": "0"}) and not is_error_reporter({"SLURM_PROCID": "3"})


def test_a_lost_rank_is_distinguished_from_a_bug() -> None:
    """Prevents endless restarts after a bug reported as a lost connection, and a lost connection reported as a bug."""
    assert lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"))
    assert lost_peer(dist.DistBackendError("NCCL error"))
    assert lost_peer(RuntimeError("size mismatch")) is None and lost_peer(ValueError("gloo/transport")) is None
