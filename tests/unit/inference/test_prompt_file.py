"""A file of prompts, split over processes that come and go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.prompt_file import PromptFile


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "id": n * 7}) + "\n" for n in range(11)) + "\n")
    return path


def share(prompts: Path, rank: int, size: int, **settings: Any) -> PromptFile:
    return PromptFile(prompts, prompts.with_name("out.jsonl"), rank, size, {"mode": "verified"} | settings)


def say(index: int, text: str) -> dict[str, Any]:
    return {"text": f"{text}!", "number": index}


def work(one: PromptFile, most: int = 1000) -> bool:
    left = iter(range(most))
    return one.work(say, lambda: next(left, None) is None, lambda *_: None)


def result(prompts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in prompts.with_name("out.jsonl").read_text().splitlines()]


def test_every_prompt_once_and_in_order_whatever_happens(prompts: Path) -> None:
    """Prompts lost or done twice when the job starts again with another number of processes, or after a kill in a line."""
    assert not work(share(prompts, 0, 3), most=2)
    assert not work(share(prompts, 2, 3))
    part = prompts.with_name("out.jsonl.parts") / "part-00000-of-00003.jsonl"
    part.write_text(part.read_text() + '{"prompt": "p6", "te')  # cut by a kill
    assert not work(share(prompts, 0, 2))
    assert not work(share(prompts, 0, 3)), "its own partial line must not become the head of another"
    assert work(share(prompts, 1, 2))
    assert [(line["prompt"], line["id"], line["text"], line["index"], line["number"]) for line in result(prompts)] == [
        (f"p{n}", n * 7, f"p{n}!", n, n) for n in range(11)
    ]
    assert not prompts.with_name("out.jsonl.parts").exists()


def test_other_settings_are_not_mixed_in(prompts: Path) -> None:
    """An output of which half was made with another model or another temperature."""
    work(share(prompts, 0, 2))
    with pytest.raises(DecodingError, match="begun with other prompts or settings"):
        work(share(prompts, 1, 2, mode="alternate"))
    assert work(share(prompts, 1, 2))
    assert work(share(prompts, 1, 4)), "whoever comes late finds all done"
    with pytest.raises(DecodingError, match="already exists"):
        work(share(prompts, 0, 1, mode="alternate"))


def test_separators_inside_a_text_are_no_line_ends(tmp_path: Path) -> None:
    """A prompt or a continuation cut at a character that some functions take for the end of a line."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x0bc"}, ensure_ascii=False) + "\n")
    assert work(share(path, 0, 1))
    assert json.loads(path.with_name("out.jsonl").read_text())["text"] == "a\u2028b\x0bc!"
