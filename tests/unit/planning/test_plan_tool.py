"""tools/plan.py as users and scripts call it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from recycle_ds.planning import command
from recycle_ds.planning.errors import PlanningError
from recycle_ds.planning.hardware import Cluster, find_gpu
from recycle_ds.planning.memory import GIB
from recycle_ds.planning.plan import make_plans
from recycle_ds.planning.report import print_plans
from tests.runs import ROOT


def plan_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plan.py"), *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip


def test_the_tool_as_scripts_call_it() -> None:
    """Prevents output other than JSON on stdout, and equal exit codes for a plan, no plan and a misspelt GPU."""
    fits = plan_tool("--config", "recyclegpt_1.3b", "--nodes", "1", "--gpus-per-node", "2", "--json", "--verify")
    assert fits.returncode == 0, fits.stderr
    assert json.loads(fits.stdout)["layouts"] and "verified: tensor" in fits.stderr
    none = plan_tool("--config", "70b", "--gpus-per-node", "1", "--gpu", "l40s", "--no-offload", "--json")
    assert none.returncode == 1
    assert json.loads(none.stdout)["layouts"] == []
    assert "error: nothing fits: the smallest layout needs" in none.stderr and "Traceback" not in none.stderr
    wrong = plan_tool("--config", "7b", "--gpu", "h1000", "--json")
    assert wrong.returncode == 2 and wrong.stdout == ""
    errors = [line for line in wrong.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--gpu h1000: not known" in errors[0] and "Traceback" not in wrong.stderr


def test_every_value_is_readable_at_80_columns() -> None:
    """Prevents headings and values that are cut to "…" on a terminal of the usual width."""
    config = command.read_run("70b", [])
    plans = make_plans(config, Cluster(1024, 8, find_gpu("h100")), offload=True, ulysses=True)
    assert any(plan.candidate.layout.ulysses > 1 for plan in plans.fitting)
    with io.StringIO() as output:
        print_plans(plans, Cluster(1024, 8, find_gpu("h100")), Console(file=output, width=80), top=1000)
        text = output.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for heading in ("TP", "PP", "DP", "Ulysses", "ZeRO", "micro", "GiB", "step s", "tokens/s", "MFU", "idle"):
        assert heading in text
    fastest = plans.fitting[0]
    assert f"{fastest.tokens_per_second:,.0f}" in text and f"{fastest.memory.total / GIB:.1f}" in text


def test_wrong_cluster_is_one_line() -> None:
    """Prevents a traceback for a misspelt GPU, and a division by zero nodes, and a search without an end for
    10^12 of them."""
    with pytest.raises(PlanningError, match=r"--gpu h1000: not known; choose one of a100-40, .*h100"):
        find_gpu("h1000")
    for nodes, gpus, message in (
        (0, 8, "--nodes 0"),
        (10**12, 8, "--nodes 1000000000000"),
        (1, 2000, "--gpus-per-node 2000"),
    ):
        with pytest.raises(PlanningError, match=f"{message}: must be from 1 to 1"):
            Cluster(nodes, gpus, find_gpu("h100"))
    with pytest.raises(PlanningError, match="--gpu-memory-gib nan: must be above 0, and finite"):
        find_gpu("h100", float("nan"))
    with pytest.raises(PlanningError, match="--gpu-memory-gib -1"):
        find_gpu("h100", -1)
    assert find_gpu("H100", 60).memory_gib == 60


def test_unknown_vocabulary_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback if the tokenizer of the run does not exist, and an error if the run itself trains it."""
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "ds_configs" / "runs" / "demo.yaml")
    with pytest.raises(PlanningError, match=r"model\.vocab_size is not given"):
        command.read_run(path, ["data.tokenizer=nowhere/tokenizer.json"])
    assert command.read_run(path, ["model.vocab_size=1024"]).model.vocab_size == 1024
    assert command.read_run(path, ["data.prepare.tokenizer_vocab=777"]).model.vocab_size == 777
