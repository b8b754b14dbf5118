"""Small real runs for tests: a corpus of 120 short documents, a tiny model, and readers for a run's files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from recycle_ds.config import RunConfig, parse_config

ROOT = Path(__file__).parents[1]


def make_corpus(folder: Path, documents: int = 120, seed: int = 5) -> Path:
    """Writes train and validation token files and a tokenizer for texts of random words; returns the folder."""
    from recycle_ds.data.prepare import prepare
    from recycle_ds.data.tokenizer import Tokenizer

    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 6))) for _ in range(80)]
    texts = [" ".join(generator.choices(words, k=generator.randint(5, 90))) for _ in range(documents)]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = Tokenizer.train(iter(texts), 300)
    tokenizer.save(folder)
    prepare(str(source), folder, tokenizer, validation_fraction=0.1, workers=1)
    return folder


def tiny_run(corpus: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """Configuration of a run of a two-layer model. changes: values by dotted key, with `__` for the dot."""
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "deepspeed": str(ROOT / "ds_configs" / "deepspeed" / "zero1.json"),
        "data": {
            "train": [{"path": str(corpus / "train")}],
            "validation": [{"path": str(corpus / "validation")}],
            "tokenizer": str(corpus / "tokenizer.json"),
        },
        "model": {"layers": 2, "hidden": 48, "heads": 4, "kv_heads": 2, "ffn": 80, "max_positions": 64},
        "recycle": {"layers": 1, "depth": 2},
        "training": {
            "steps": 5, "micro_batch_size": 2, "global_batch_size": 8, "seq_length": 24, "learning_rate": 5e-3,
            "warmup_steps": 2, "log_every": 1, "tensorboard": False,
        },
        "faults": {"hang_timeout": 0},  # several runs share a process, and the test harness reports hangs
    }  # fmt: skip
    return parse_config(tree, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()])


def zero(stage: int | str) -> str:
    """Path of a shipped DeepSpeed file."""
    return str(ROOT / "ds_configs" / "deepspeed" / f"zero{stage}.json")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def steps_of(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of logged steps."""
    return [record for record in read_metrics(run_dir) if "loss" in record]


def figures(run_dir: str | Path) -> list[list[float]]:
    """Per logged step: the total, backbone and recycle losses and the gradient norm."""
    return [[r["loss"], r["backbone_loss"], *r["recycle_loss"], r["grad_norm"]] for r in steps_of(run_dir)]


def tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, assembled, by kind and canonical name."""
    from recycle_ds.checkpoint.portable.manifest import read_manifest
    from recycle_ds.checkpoint.portable.reading import PortableSource

    manifest = read_manifest(folder)
    reader = PortableSource(folder, manifest)
    return {
        f"{kind}/{name}": reader.read(name, kind)
        for name, entry in manifest.tensors.items()
        for kind in {piece.kind for piece in entry.slices}
    }
