"""Files of prompts for tests, continued by a function instead of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.config import RecycleError
from recycle_ds.inference.batch.prompt_file import PromptFile


@dataclass(frozen=True)
class Loaded:
    """Replaces a loaded model."""

    path: Path


def model_of(folder: Path, content: str = "weights") -> str:
    """Path of a model in a format without checksums."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(content)
    return str(folder)


def share(prompts: Path, rank: int, size: int, **settings: Any) -> PromptFile:
    """One process of several that continue a file of prompts."""
    model = str(settings.pop("model", None) or model_of(prompts.with_name("model")))
    return PromptFile(prompts, prompts.with_name("out.jsonl"), rank, size, model, {"mode": "verified"} | settings)


def continuation(prompts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any] | RecycleError]]:
    """Stands for a model: the text with an exclamation mark."""
    for index, text in prompts:
        yield index, {"text": f"{text}!", "new_tokens": index}


def work(one: PromptFile, most: int = 1000) -> bool:
    """Continues prompts, at most so many. Whether the output is complete."""
    left = iter(range(most))
    if one.settle(lambda path: Loaded(Path(path))) is None:
        return True
    return one.work(continuation, lambda: next(left, None) is None, lambda *_: None)


def result(prompts: Path) -> list[dict[str, Any]]:
    """The lines of the output."""
    return [json.loads(line) for line in prompts.with_name("out.jsonl").read_text().splitlines()]


def settle(one: PromptFile) -> str | None:
    """Path of the model that `settle` loads."""
    loaded = one.settle(lambda path: Loaded(newest(Path(path))))
    return None if loaded is None else str(loaded.path)


def newest(folder: Path) -> Path:
    """The newest checkpoint of a run, or the folder itself."""
    return max(completed(folder), default=folder)
