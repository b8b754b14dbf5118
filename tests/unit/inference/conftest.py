"""Fixtures: a trained model, and the generate command."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.generate import main
from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.runs import make_corpus, tiny_run
from tests.unit.inference.command import Generate, Outcome


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a model with a long context, after three steps of training."""
    root = tmp_path_factory.mktemp("generate")
    run = tiny_run(make_corpus(root / "corpus"), root / "run", training__steps=3, model__max_positions=4096)
    assert run_ranks(run_all, 1, [run], timeout=300) == [["finished"]]
    return root / "run"


@pytest.fixture
def generate(model: Path, capfd: pytest.CaptureFixture[str]) -> Generate:
    """Runs the command in this process."""

    def call(*arguments: str, folder: str | None = None) -> Outcome:
        with pytest.raises(SystemExit) as exit_info:
            main(["--model", folder or str(model), *arguments])
        return Outcome(int(exit_info.value.code or 0), *capfd.readouterr())

    return call
