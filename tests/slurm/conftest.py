"""The cluster, the corpus and the uninterrupted run that all tests of this folder share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from recycle_ds.config import save_config
from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.runs import figures, make_corpus, tiny_run
from tests.slurm.cluster import Cluster, unavailable_reason
from tests.slurm.jobs import Jobs

STEPS = 40


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(root)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus/, and run.yaml: a run of STEPS steps that saves every five."""
    root = tmp_path_factory.mktemp("slurm")
    config = tiny_run(
        make_corpus(root / "corpus"), root / "reference", training__steps=STEPS, training__save_every=5,
        training__learning_rate=1e-3, training__keep_checkpoints=4, faults__stop_margin=0.0,
    )  # fmt: skip
    save_config(config, root / "run.yaml")
    return root


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, lab: Path) -> Jobs:
    return Jobs(cluster, lab)


@pytest.fixture(scope="session")
def reference(lab: Path) -> list[list[float]]:
    """Losses and gradient norms of the same run on one host, with as many ranks, without interruption."""
    from recycle_ds.config import load_config

    assert run_ranks(run_all, 4, [load_config(lab / "run.yaml")], timeout=300) == [["finished"]] * 4
    return figures(lab / "reference")
