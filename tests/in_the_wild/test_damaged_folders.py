"""Random damage to every file of a model folder: the right logits, or an error of one line and nothing half-written."""

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
from safetensors.torch import load_file

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.huggingface.names import hugging_face_name
from recycle_ds.checkpoint.loading import load_model
from recycle_ds.data.errors import DataError
from tests.conftest import TEST_ALL
from tests.in_the_wild.folders import CLOSE, TOKENS, byte_tokenizer, edit_json, gap, ours, theirs
from tests.unit.checkpoint.families import make
from tests.unit.checkpoint.test_fuzz import nodes

INPUTS = 1500 if TEST_ALL else 300
FAMILIES = ("llama_tied", "llama3_rope", "qwen2", "qwen3", "smollm3")
JUNK: list[Any] = [
    None, -1, 0, 1, 2, 7, 1e9, 0.5, 1e-30, "", "7", "llama", "qwen3", "../../etc/passwd", [], [1], {}, {"a": 1}, True, False,
    "x" * 300, 10**30, float("nan"), float("inf"), "a\nb", "\ud800",
]  # fmt: skip
SPECIAL = tuple(f"<|{number}|>" for number in range(257, 300))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per family, with sharded weights, a tokenizer and all the files beside it."""
    root = tmp_path_factory.mktemp("originals")
    for name in FAMILIES:
        folder = root / name
        make(name).save_pretrained(folder, max_shard_size="120KB")
        assert (folder / "model.safetensors.index.json").is_file()
        byte_tokenizer(folder, *SPECIAL)
        edit_json(folder / "config.json", eos_token_id=[256, 257], bos_token_id=None, pad_token_id=None)
        edit_json(folder / "generation_config.json", eos_token_id=258, bos_token_id=None, pad_token_id=None)
        edit_json(folder / "special_tokens_map.json", eos_token="<|259|>")
    return root


def change_json(folder: Path, draw: random.Random) -> str:
    """Deletes, replaces, renames or repeats a value of a JSON file. Returns the file's name."""
    weights = {"config.json": 8, "model.safetensors.index.json": 3, "generation_config.json": 2}
    names = sorted(path.name for path in folder.glob("*.json"))
    path = folder / draw.choices(names, [weights.get(name, 1) for name in names])[0]
    tree = json.loads(path.read_text(encoding="utf-8"))
    places = [place for place in nodes(tree) if len(place) < 3 or draw.random() < 0.02] or nodes(tree)
    *parents, last = draw.choice(places)
    holder = tree
    for key in parents:
        holder = holder[key]
    how = draw.randrange(5)
    if how == 0:
        del holder[last]
    elif how == 1 and isinstance(holder, dict):
        holder[draw.choice(["no_rope_layers", "sliding_window", "head_dim", "embedding_multiplier", f"{last}~"])] = (
            holder[last]
        )
    elif how == 2 and type(holder[last]) in (int, float):
        holder[last] = draw.choice(
            [holder[last] + 1, holder[last] * 2, -holder[last], str(holder[last]), [holder[last]]]
        )
    else:
        holder[last] = draw.choice(JUNK)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path.name


def change_bytes(folder: Path, draw: random.Random) -> str:
    """Flips a bit of a file, truncates it, appends to it, or changes how its text is stored. Returns the file's name."""
    path = draw.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    how = draw.randrange(6)
    if how == 0:
        del content[draw.randrange(len(content)) :]
    elif how == 1:
        content += bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
    elif how == 2:
        content = bytearray(b"\xef\xbb\xbf") + content
    elif how == 3:
        content = bytearray()
    else:  # in the first bytes: the header of a safetensors file
        content[draw.randrange(min(len(content), 4000))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return path.name


def change_files(folder: Path, draw: random.Random) -> str:
    """Removes a file, puts another in its place, or a folder. Returns the file's name."""
    path, other = draw.sample(sorted(folder.iterdir()), 2)
    path.unlink()
    how = draw.randrange(4)
    if how == 0:
        path.mkdir()
    elif how == 1:
        shutil.copyfile(other, path)
    elif how == 2:
        path.symlink_to("nowhere")
    return path.name


def expected_logits(folder: Path) -> torch.Tensor | None:
    """transformers' logits of a damaged folder; None if it cannot load it, or replaces missing weights by random ones."""
    from transformers import AutoModelForCausalLM

    try:
        _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        return None if report["missing_keys"] or report["mismatched_keys"] else theirs(folder)
    except Exception:  # it raises exceptions of many kinds
        return None


def check_one(number: int, originals: Path, root: Path) -> str:
    """Damages a folder and converts and loads it. Returns what came of it."""
    draw = random.Random(number)
    folder = root / f"{number}"
    shutil.copytree(originals / draw.choice(FAMILIES), folder)
    change: Callable[[Path, random.Random], str] = draw.choices([change_json, change_bytes, change_files], [5, 3, 1])[0]
    name = change(folder, draw)
    target = draw.choice(["portable", "hf", "megatron"])
    out = root / f"out-{number}"
    try:
        result = convert(str(folder), str(out), Conversion(target))
        load_model(str(out))
    except (CheckpointError, DataError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1200, str(error)
        # what converts but does not load is a model without a usable tokenizer
        assert not out.exists() or "token" in str(error), str(error)
        return f"{change.__name__}: refused"
    finally:
        assert [path.name for path in root.iterdir() if path.name.startswith(".tmp-")] == []
    if name.endswith(".safetensors"):
        stored = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
        for tensor in result.shapes:
            assert torch.equal(
                result.read(tensor).view(torch.int32), stored[hugging_face_name(tensor)].view(torch.int32)
            )
        return f"{change.__name__}: equal weights"
    if name not in ("config.json", "model.safetensors.index.json"):
        return f"{change.__name__}: not read"
    expected = expected_logits(folder)
    if expected is None:
        return f"{change.__name__}: transformers fails"
    length = min(TOKENS.shape[1], result.model.max_positions)  # a window limits them
    assert gap(ours(result, TOKENS[:, :length]), expected[:, :length]) < CLOSE
    return f"{change.__name__}: equal logits"


def test_damaged_folders(originals: Path, tmp_path: Path) -> None:
    """Prevents a stack trace, a folder that is half-written, and other logits than those that the files describe."""
    outcomes: Counter[str] = Counter()
    for number in range(INPUTS):
        try:
            outcomes[check_one(number, originals, tmp_path)] += 1
        except Exception as error:
            raise AssertionError(f"input {number}: {type(error).__name__}: {error}") from error
        for folder in (f"{number}", f"out-{number}"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
    assert sum(outcomes.values()) == INPUTS
    assert all(any(kind in outcome for outcome in outcomes) for kind in ("refused", "equal weights", "equal logits"))
