"""The engine over many ranks: every answer is the one of a single stream in a single process, token for token."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.inference import Generation
from recycle_ds.inference.engine.build import team_engine
from recycle_ds.inference.engine.runner import Runner
from recycle_ds.inference.engine.team import build_team
from recycle_ds.model import build_model
from recycle_ds.parallel.peers import PEER_LOST
from tests.distributed import run_ranks
from tests.runs import ROOT
from tests.unit.inference.engine.requests import (
    Asked,
    check_answers,
    decode_alone,
    decode_together,
    free_drafts,
    memory_of,
    moves_of,
    requests,
    with_texts,
)
from tests.unit.inference.models import Letters, spread_added

CONFIG = ModelConfig(
    layers=3, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=11, vocab_multiple=4, max_positions=96, init_std=0.6
)
RECYCLE = RecycleConfig(layers=1)
TAPPED = RecycleConfig(layers=1, taps=(0, 1, 2))
"""Of two stages the first has the blocks 0 and 1."""
DRAFT_IDS = [0, 1, 2, 4, 5]
"""All on the first of two tensor ranks."""
LAYOUTS = {
    "TP2": (2, 1, 2, RECYCLE), "PP2": (1, 2, 2, TAPPED), "TP2 x PP2": (2, 2, 4, RECYCLE), "DP2": (1, 1, 2, RECYCLE),
    "TP2 with taps": (2, 1, 2, TAPPED),
}  # fmt: skip


def _serve(
    rank: int, world_size: int, tensor: int, pipeline: int, recycle: RecycleConfig, asked: list[Asked]
) -> list[Generation] | None:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    team = build_team(tensor, pipeline, torch.device("cpu"))
    model = spread_added(build_model(CONFIG, recycle, team.mesh, seed=5).eval())
    model.draft_ids = torch.tensor(DRAFT_IDS)
    engine = team_engine(model, team, max_batch=12, kv_memory_gib=memory_of(model, 14), text_source=Letters)
    if engine is None:
        return None
    moves = moves_of(engine)
    if tensor * pipeline > 1:  # a process on its own measures
        free_drafts(engine)
    answers = decode_together(engine, asked[team.mesh.data.rank :: team.mesh.data.size])
    assert engine.scheduler.preemptions > 0, "the test needs preemptions"
    assert tensor * pipeline == 1 or sum(moves) > 5, "the test needs accepted drafts off the main path"
    ranks = [int(rank) for rank in re.findall(r"rank (\d+) \d+ %", engine.explanation())]
    assert ranks == (dist.get_process_group_ranks(team.control) if tensor * pipeline > 1 else [])
    engine.close()
    engine.abort()  # as after Ctrl-C: nothing more may be asked of the other ranks
    assert "rank" not in engine.explanation()
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_do_not_depend_on_the_layout(layout: str) -> None:
    """Prevents a shard, a stage or a micro-batch from changing a token, and a choice of tokens that needs all logits."""
    tensor, pipeline, ranks, recycle = LAYOUTS[layout]
    asked = [
        replace(one, params=replace(one.params, draft_tokens=None)) if one.mode == "verified" and number % 2 else one
        for number, one in enumerate(with_texts(requests(64, vocabulary=11, seed=3), seed=3))
    ]
    model = spread_added(build_model(CONFIG, recycle, seed=5).eval())
    model.draft_ids = torch.tensor(DRAFT_IDS)
    found = [answers for answers in run_ranks(_serve, ranks, tensor, pipeline, recycle, asked) if answers is not None]
    for data, part in enumerate(found):
        own = asked[data :: len(found)]
        check_answers(own, part, decode_alone(model, own))


_TEAM = """
import itertools, os, signal, sys
from recycle_ds.inference.engine.build import local_engine, team_engine
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.ranks import join, lost_ranks_end_the_job
from recycle_ds.model import build_model
from recycle_ds.parallel.rendezvous import detect_launch
from tests.parallel.test_engine import CONFIG, RECYCLE, fail_after

tensor, pipeline, rank, number = map(int, sys.argv[1:])
ranks = join(detect_launch(os.environ), tensor, pipeline)
if ranks.rank == rank:
    fail_after(6, number)
model = build_model(CONFIG, RECYCLE, ranks.mesh, seed=5).eval()
with lost_ranks_end_the_job():
    if ranks.team is None:
        engine = local_engine(model, max_batch=4, watch=ranks.watch)
    else:
        engine = team_engine(model, ranks.team, max_batch=4, watch=ranks.watch)
    for count in itertools.count():
        engine.finish(engine.add([1, 2], SamplingParams(max_new_tokens=40), "verified"))
        if count == 0:
            print("decoding", file=sys.stderr, flush=True)
"""
_HANG = 0
"""In place of a signal: the program goes on without an end."""


def fail_after(steps: int, number: int) -> None:
    """Lets this rank send itself a signal in one of its next steps, or hang in it."""
    run = Runner.run

    def failing(self: Runner, *arguments: Any) -> Any:
        nonlocal steps
        steps -= 1
        while steps < 0 and number == _HANG:
            time.sleep(0.1)
        if steps < 0:
            os.kill(os.getpid(), number)
        return run(self, *arguments)

    Runner.run = failing  # type: ignore[method-assign]


_STORE = "has the job's store, which cannot be reached"
_SILENT, _HANGS = "has shown no sign of life for 8 s", "hangs: nothing has gone on in a step for"


@pytest.mark.parametrize(
    "failures",
    [
        pytest.param([(2, 1, 1, signal.SIGSTOP, _SILENT), (1, 2, 1, signal.SIGKILL, _SILENT)], id="lost"),
        pytest.param([(2, 1, 0, signal.SIGSTOP, _STORE)], id="with the store"),
        pytest.param([(2, 1, 1, _HANG, _HANGS), (1, 1, 1, _HANG, _HANGS)], id="hangs"),
    ],
)
def test_a_lost_rank_ends_the_job_and_is_named(failures: list[tuple[int, int, int, int, str]]) -> None:
    """Prevents ranks that wait for ever for one that is dead, stopped or hangs, an error that does not say which one it is,
    and one error of each rank for the same loss."""
    jobs = [(failure, _start(*failure[:4])) for failure in failures]
    try:
        for (tensor, pipeline, lost, number, text), ranks in jobs:
            alone = tensor * pipeline == 1  # then the others go on
            ends = [lost] if alone else [0, 1] if number == _HANG else [1 - lost]
            lines = []
            for rank in ends:
                _, error = ranks[rank].communicate(timeout=120)
                assert ranks[rank].returncode == PEER_LOST, error
                lines += [line for line in error.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and lines[0].startswith(f"error: rank {lost} {text}"), lines
            assert not alone or ranks[0].poll() is None
            if number == signal.SIGSTOP:  # a launcher's SIGTERM would not end it
                assert ranks[lost].wait(timeout=30) == -signal.SIGKILL
    finally:
        for _, ranks in jobs:
            for one in ranks:
                one.kill()
                one.communicate()


def test_a_suspended_job_goes_on() -> None:
    """Prevents ranks that a scheduler has suspended for a while from being taken for lost, or for hanging, when they resume."""
    jobs = [_start(tensor, pipeline, lost=-1, number=_HANG) for tensor, pipeline in ((2, 1), (1, 2))]
    ranks = [one for job in jobs for one in job]
    try:
        for job in jobs:  # the other ranks follow it
            assert job[0].stderr is not None and any(line == "decoding\n" for line in job[0].stderr)
        for number, order in ((signal.SIGSTOP, (1, 0)), (signal.SIGCONT, (0, 1))):
            for rank in order:  # on other hosts, a moment later: the first one finds an old sign of life of the second
                for job in jobs:
                    job[rank].send_signal(number)
                time.sleep(1.2)
            time.sleep(10)  # a loss is found after 8 s
        ended = [one for one in ranks if one.poll() is not None]
        assert not ended, [one.communicate()[1] for one in ended]
    finally:
        for one in ranks:
            one.kill()
            one.communicate()


def test_the_rank_with_the_store_says_that_it_hangs_before_a_launcher_ends_it() -> None:
    """Prevents a job without a message: the other rank hears of the loss and ends, and the launcher then ends this one."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    arguments = ("1", "2", "0", str(_HANG))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, *launch, sys.executable, "-c", _TEAM, *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode != 0
    lines = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(f"error: rank 0 {_HANGS}"), found.stderr


def _start(tensor: int, pipeline: int, lost: int, number: int) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Two ranks, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _TEAM, str(tensor), str(pipeline), str(lost), str(int(number))]

    def start(rank: int) -> subprocess.Popen[str]:
        own = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        return subprocess.Popen(
            command, cwd=ROOT, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    return start(0), start(1)
