"""The documented commands that need a cluster: sbatch accepts the options, and the programs accept their arguments."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from recycle_ds import generate, pretrain, serve
from recycle_ds.checkpoint.conversion import command as convert
from recycle_ds.config import load_config
from recycle_ds.inference.self_text import command as self_text
from tests.documents import CLUSTER, FILES, Command, commands
from tests.runs import ROOT, steps_of
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
SHOWN = [command for file in FILES for command in commands(file) if command.program in CLUSTER]
# The program that each sbatch file runs, and how many leading arguments belong to the file itself.
PROGRAMS = {
    "slurm/pretrain.sbatch": (pretrain.app, 0),
    "slurm/generate.sbatch": (generate.app, 0),
    "slurm/convert.sbatch": (convert.app, 0),
    "slurm/serve.sbatch": (serve.app, 0),
    "slurm/sweep.sbatch": (pretrain.app, 1),
}
RETROFIT = "slurm/retrofit.sbatch"
# The cluster of the tests is small: later options replace those of the document.
SIZE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


def test_every_sbatch_command_is_accepted(cluster: Cluster) -> None:
    """Prevents a documented option that sbatch, or the program that the sbatch file runs, does not have."""
    batches = [command for command in SHOWN if command.program == "sbatch"]
    assert len(batches) >= 8
    for command in batches:
        words = command.small
        place = next(number for number, word in enumerate(words) if word.startswith("slurm/"))
        script, arguments = words[place], words[place + 1 :]
        assert (ROOT / script).is_file(), command.where
        cluster.run("sbatch", "--test-only", *words[1:place], *SIZE, str(ROOT / script), *arguments)
        if script == RETROFIT:
            _check_retrofit(arguments)
            continue
        app, own = PROGRAMS[script]
        context = typer.main.get_command(app).make_context(script, arguments[own:])
        if app is pretrain.app:
            load_config(context.params["config"], context.params["overrides"] or (), _of_init_from)


def _check_retrofit(arguments: Sequence[str]) -> None:
    """Checks both programs of a retrofit: what the batch file adds is checked by its own test."""
    (model,) = (value for name, value in itertools.pairwise(arguments) if name == "--model")
    options, settings, words = ["--output", "data/text"], [f"init_from={model}"], list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            settings.append(word)
        elif word == "--config":
            words.pop(0)
        else:
            options += [word, words.pop(0)]
    if "--tokens" in options:
        typer.main.get_command(self_text.app).make_context(RETROFIT, options)
    load_config("retrofit_smollm2", [*settings, "recycle.taps=[0,1]"], _of_init_from)  # of a smaller model


def _of_init_from(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What `init_from` supplies in a run: a model's shape and its tokenizer."""
    if "init_from" not in tree:
        return {}
    demo = load_config("demo").model_dump(mode="json")
    return {"model": demo["model"], "data": {"tokenizer": demo["data"]["tokenizer"]}}


def test_the_srun_command_trains(cluster: Cluster, tmp_path: Path) -> None:
    """Prevents ranks started by plain srun that do not form one group."""
    (command,) = (one for one in SHOWN if one.program == "srun" and "pretrain" in one.text)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{cluster.environment['PATH']}"
    script = " ".join(f"'{word}'" for word in _on_the_cluster(command))
    out = cluster.run(
        "bash", "-c", f"cd '{tmp_path}' && exec {script}", PATH=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"
    )
    assert "finished at step 2" in out and "on 2 rank(s)" in out
    assert [record["step"] for record in steps_of(tmp_path / "runs" / "srun")] == [1, 2]


def _on_the_cluster(command: Command) -> list[str]:
    return ["srun", "--nodes=1", *command.small[1:]]
