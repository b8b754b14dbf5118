"""Fixtures: a tiny model and a server that runs for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.loading import LoadedModel
from tests.browser import chromium
from tests.serving.page_model import Visit, make_page_model
from tests.serving.processes import write_model
from tests.serving.servers import Server, make_model, serving


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def page_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model of the browser tests, whose texts contain HTML."""
    return make_page_model(tmp_path_factory.mktemp("page_model"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser. Of one file only: until it is closed, this thread cannot run another event loop."""
    with chromium() as started:
        yield started


@pytest.fixture
def visits(browser: Any) -> Iterator[list[Visit]]:
    """Visits to check and to close."""
    made: list[Visit] = []
    yield made
    for visit in made:
        visit.check()
        visit.close()


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Server]:
    """A server without keys."""
    with serving(loaded) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="session")
def model_folder(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a folder, as a server loads it."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    write_model(loaded, folder)
    return folder
