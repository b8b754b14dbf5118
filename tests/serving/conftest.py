"""Fixtures: a tiny model and a server that runs for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from tests.serving.servers import Server, make_model, serving


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Server]:
    """A server without keys."""
    with serving(loaded) as running:
        yield running
        running.wait_idle()
