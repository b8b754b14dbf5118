"""Warnings that a run prints when it starts."""

from __future__ import annotations

import pytest

from recycle_ds.config import load_config
from recycle_ds.config.setting_warnings import setting_warnings


@pytest.mark.parametrize(("overrides", "resumed", "warned"), [
    (["recycle.gradient=frozen_backbone"], False, True),
    (["recycle.gradient=frozen_backbone"], True, False),
    (["recycle.gradient=frozen_backbone", "init_from=models/smollm2"], False, False),
    (["recycle.gradient=detached"], False, False),
])  # fmt: skip
def test_a_frozen_backbone_of_random_weights_is_reported(overrides: list[str], resumed: bool, warned: bool) -> None:
    """Prevents a run of hours that trains a module on random weights without a word, because init_from was forgotten."""
    found = setting_warnings(load_config("demo", overrides), resumed=resumed)
    assert [("init_from=FOLDER" in line) for line in found] == ([True] if warned else [])
