"""Hundreds of broken checkpoints: each is refused in one line, or loads exactly the weights that were saved."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.loading import load_weights
from recycle_ds.checkpoint.portable.manifest import digest_of
from recycle_ds.checkpoint.portable.writing import write_portable
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.model import build_model
from tests.unit.checkpoint.memory import ModelSource

MUTATIONS = 240
CONFIG = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=30, max_positions=16)
MODULE = RecycleConfig(layers=1, depth=2)


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON tree."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += nodes(value, (*path, key))
    return found


def change_json(folder: Path, draw: random.Random) -> None:
    """Deletes, replaces or duplicates a value of the manifest."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    *parents, last = draw.choice(nodes(tree))
    holder = tree
    for key in parents:
        holder = holder[key]
    how = draw.randrange(4)
    if how == 0:
        del holder[last]
    elif how == 1:
        holder[last] = draw.choice([None, -1, 0, 7, 1e9, "", "../../etc/passwd", [], {}, True, "x" * 200])
    elif how == 2 and isinstance(holder, dict):
        holder[f"{last}~"] = holder[last]
    elif isinstance(holder[last], int):
        holder[last] += draw.choice([-1, 1])
    else:
        holder[last] = draw.choice([holder, last])
    try:
        path.write_text(json.dumps(tree))
    except ValueError:  # the tree contains itself now
        path.write_text("{")


def change_bytes(folder: Path, draw: random.Random) -> None:
    """Flips a bit of a file, truncates it, or appends to it."""
    path = draw.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    how = draw.randrange(4)
    if how == 0:
        del content[draw.randrange(len(content)) :]
    elif how == 1:
        content += bytes(draw.randrange(1, 20))
    else:  # often near the start: headers are short
        position = draw.randrange(len(content)) if how == 2 else draw.randrange(min(64, len(content)))
        content[position] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def change_files(folder: Path, draw: random.Random) -> None:
    """Removes a file, swaps two, replaces one by a folder or a link, or adds one."""
    files = sorted(folder.iterdir())
    one, other = draw.sample(files, 2)
    how = draw.randrange(5)
    if how == 0:
        one.unlink()
    elif how == 1:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
    elif how == 2:
        one.unlink()
        one.mkdir()
    elif how == 3:
        one.unlink()
        one.symlink_to(other)
    else:
        (folder / "notes.txt").write_text("text")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in several shards, and its weights."""
    folder = tmp_path_factory.mktemp("fuzz") / "intact"
    folder.mkdir()
    model = build_model(CONFIG, MODULE, seed=3)
    write_portable(ModelSource(model, CONFIG, MODULE, folder), folder, None, 6000, lambda _: None)
    assert len(list(folder.glob("shard-*"))) >= 3
    return folder, {name: value.detach().clone() for name, value in model.named_parameters()}


def test_broken_checkpoints(intact: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Prevents a crash, a traceback for the user, and weights other than those that were saved."""
    source, expected = intact
    draw = random.Random(11)
    kinds: list[Callable[[Path, random.Random], None]] = [change_json, change_bytes, change_files]
    outcomes: Counter[tuple[str, str]] = Counter()
    for number in range(MUTATIONS):
        folder = tmp_path / f"{number}"
        shutil.copytree(source, folder)
        mutate = kinds[number % len(kinds)]
        mutate(folder, draw)
        model = build_model(CONFIG, MODULE, seed=4)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        try:
            opened = open_source(folder)
            assert (opened.model, opened.recycle) == (CONFIG, MODULE)
            load_weights(model, opened)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(folder) in str(error), str(error)
            outcome, wanted = "refused", before
        else:
            outcome, wanted = "loaded", expected
        for name, value in model.named_parameters():
            assert torch.equal(value, wanted[name]), f"mutation {number}: {name} {outcome} with other weights"
        outcomes[mutate.__name__, outcome] += 1
        shutil.rmtree(folder)
    # nearly all mutations do damage; an added file does none
    assert outcomes["change_json", "refused"] > 70 and outcomes["change_bytes", "refused"] > 70
    assert outcomes["change_files", "refused"] > 40 and outcomes["change_files", "loaded"] > 5


def test_a_manifest_with_a_valid_digest_is_checked_as_well(
    intact: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Prevents a wrong manifest with a valid digest from being trusted.

    In the test above, the digest check refuses most mutations before the other checks run.
    """
    source, expected = intact
    draw = random.Random(17)
    outcomes: Counter[str] = Counter()
    original = json.loads((source / "manifest.json").read_text())
    for number in range(MUTATIONS):
        folder = tmp_path / f"{number}"
        shutil.copytree(source, folder)
        change_json(folder, draw)
        path = folder / "manifest.json"
        try:
            tree = json.loads(path.read_text())
        except ValueError:
            continue
        tree["digest"] = digest_of(tree)
        path.write_text(json.dumps(tree))
        model = build_model(CONFIG, MODULE, seed=4)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        try:
            opened = open_source(folder)
            load_weights(model, opened)
            outcome, wanted = "loaded", expected
            same = (opened.model, opened.recycle) == (CONFIG, MODULE) and tree["tensors"] == original["tensors"]
        except CheckpointError as error:
            assert "\n" not in str(error) and str(folder) in str(error), str(error)
            outcome, wanted, same = "refused", before, True
        if same:
            assert all(torch.equal(value, wanted[name]) for name, value in model.named_parameters()), number
        outcomes[outcome] += 1
        shutil.rmtree(folder)
    # numbers such as the step may change undetected; the locations of tensors may not
    assert outcomes["refused"] > MUTATIONS / 2, outcomes


def test_checkpoints_of_the_first_release_are_read(intact: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Prevents runs of an older release from failing to resume, and damaged manifests from being read as older ones."""
    source, expected = intact
    folder = tmp_path / "old"
    shutil.copytree(source, folder)
    tree = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(tree | {"version": 1}))
    with pytest.raises(CheckpointError, match="version 1"):
        open_source(folder)
    for key in ("digest", "rollbacks", "recent"):
        del tree[key]
    (folder / "manifest.json").write_text(json.dumps(tree | {"version": 1}))
    model = build_model(CONFIG, MODULE, seed=4)
    load_weights(model, open_source(folder))
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


def test_no_file_is_unpickled() -> None:
    """Prevents a checkpoint from running code when it is opened: the package calls no loader that can run code."""
    from tests.runs import ROOT

    for path in (ROOT / "recycle_ds").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for call in ("pickle.load", "load_checkpoint(", "trust_remote_code=True", "weights_only=False"):
            assert call not in text, f"{path.name}: {call}"
        assert text.count("torch.load(") == text.count("weights_only=True"), path.name
