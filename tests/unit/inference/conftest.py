"""Fixtures: a trained model, the generate command, and a file of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds.generate import main
from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.runs import make_corpus, tiny_run
from tests.unit.inference.command import Generate, Outcome

DRAFT_VOCABULARY = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a model with a long context and a draft vocabulary, after three steps of training."""
    root = tmp_path_factory.mktemp("generate")
    changes = {"training__steps": 3, "model__max_positions": 4096, "recycle__draft_vocabulary": DRAFT_VOCABULARY}
    run = tiny_run(make_corpus(root / "corpus"), root / "run", **changes)
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


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of eleven prompts with ids."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "id": n * 7}) + "\n" for n in range(11)) + "\n")
    return path
