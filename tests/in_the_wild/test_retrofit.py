"""A module for a Qwen3 and a SmolLM3: trained on two tensor ranks, with the backbone, its end tokens and files unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.loading import load_model
from recycle_ds.checkpoint.run.init_from import init_from_defaults
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config import parse_config
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.model.initialisation import initial_tensor
from tests.distributed import run_in_sets
from tests.in_the_wild.folders import edit_json, gap, theirs
from tests.parallel.ranks import run_all
from tests.runs import make_corpus, zero
from tests.unit.checkpoint.families import save

FAMILIES = ("qwen3", "smollm3")


def _has_moved(source: Source, name: str) -> bool:
    """Whether a tensor of the module is no longer the initial one."""
    return not torch.equal(source.read(name), initial_tensor(name, tuple(source.shapes[name]), source.model, 1234))


def test_a_retrofit_keeps_the_model(tmp_path: Path) -> None:
    """Prevents a run that forgets the model's norms or layers, and checkpoints that lose its end tokens."""
    corpus = make_corpus(tmp_path / "corpus")
    runs = []
    for name in FAMILIES:
        folder = tmp_path / name
        save(name, folder)
        Tokenizer.load(corpus).save(folder)
        edit_json(folder / "config.json", eos_token_id=[0, 7], bos_token_id=3, pad_token_id=4)
        edit_json(
            folder / "generation_config.json", ("bos_token_id", "pad_token_id"), eos_token_id=[8], temperature=0.6
        )
        tree = {
            "run_dir": str(tmp_path / f"run_{name}"),
            "deepspeed": zero(1),
            "init_from": str(folder),
            "data": {"train": [{"path": str(corpus / "train")}]},
            "recycle": {"gradient": "frozen_backbone"},
            "parallel": {"tensor": 2},
            "training": {
                "steps": 3, "micro_batch_size": 2, "global_batch_size": 4, "seq_length": 24, "learning_rate": 5e-3,
                "log_every": 1, "tensorboard": False,
            },
            "faults": {"hang_timeout": 0},
        }  # fmt: skip
        runs.append(parse_config(tree, (), init_from_defaults))
    assert run_in_sets(run_all, 2, runs) == [["finished"] * len(runs)] * 2
    for name, config in zip(FAMILIES, runs, strict=True):
        assert config.model.qk_norm == (name == "qwen3") and bool(config.model.rope.unrotated_layers) == (
            name == "smollm3"
        )
        out = tmp_path / f"out_{name}"
        result = convert(config.run_dir, str(out), Conversion("hf"))
        assert result.recycle.layers == 1 and gap(theirs(out), theirs(tmp_path / name)) == 0
        moved = {tensor for tensor in result.shapes if tensor.startswith("recycle.") and _has_moved(result, tensor)}
        assert moved == {tensor for tensor in result.shapes if tensor.startswith("recycle.")}
        assert load_model(config.run_dir).tokenizer.end_ids == {0, 7, 8}
        written = json.loads((out / "config.json").read_text())
        assert set(written["eos_token_id"]) == {0, 7, 8}
        assert (written["bos_token_id"], written["pad_token_id"]) == (3, 4)
        assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
