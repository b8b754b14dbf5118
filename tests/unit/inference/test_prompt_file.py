"""A file of prompts, split over processes that come and go."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.checkpoint.portable.manifest import write_manifest
from recycle_ds.inference.batch.parts_record import digest_of
from recycle_ds.inference.batch.prompt_file import PromptError, PromptFile, read_prompt_file
from recycle_ds.inference.errors import DecodingError


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "id": n * 7}) + "\n" for n in range(11)) + "\n")
    return path


@dataclass(frozen=True)
class Loaded:
    """Stands for a model."""

    path: Path


def model_of(folder: Path, content: str = "weights") -> str:
    """Path of a model in a format without checksums."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(content)
    return str(folder)


def share(prompts: Path, rank: int, size: int, **settings: Any) -> PromptFile:
    model = str(settings.pop("model", None) or model_of(prompts.with_name("model")))
    return PromptFile(prompts, prompts.with_name("out.jsonl"), rank, size, model, {"mode": "verified"} | settings)


def say(index: int, text: str) -> dict[str, Any]:
    return {"text": f"{text}!", "number": index}


def work(one: PromptFile, most: int = 1000) -> bool:
    left = iter(range(most))
    if one.settle(lambda path: Loaded(Path(path))) is None:
        return True
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


def settle(one: PromptFile) -> str | None:
    """The path of the model that is loaded."""
    loaded = one.settle(lambda path: Loaded(newest(Path(path))))
    return None if loaded is None else str(loaded.path)


def newest(folder: Path) -> Path:
    """What a run's name stands for at the moment."""
    return max(completed(folder), default=folder)


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """A checkpoint of a run, without weights."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    counts = dict.fromkeys(("step", "next_sample", "skipped", "rollbacks", "adam_step"), step)
    empty: dict[str, Any] = {name: {} for name in ("config", "layout", "provenance", "tensors", "files")}
    write_manifest(folder, {**counts, "recent": [], "data": {"tokenizer": "t", "train": []}, **empty})
    return folder


def test_a_live_run_is_one_model(prompts: Path, tmp_path: Path) -> None:
    """An output of two models, because the run that --model names had saved anew when a later start or another rank looked."""
    run = tmp_path / "run"
    first = checkpoint_of(run, 5)
    assert settle(share(prompts, 0, 2, model=run)) == str(first)
    checkpoint_of(run, 10)
    assert settle(share(prompts, 1, 2, model=run)) == str(first), "a later start, or a rank that came later"
    assert settle(share(prompts, 1, 2, model=first)) == str(first), "the same, by its own name"
    with pytest.raises(DecodingError, match=f"not with {tmp_path}/model: go on with --model {first}, or"):
        settle(share(prompts, 0, 2))
    shutil.rmtree(first)
    with pytest.raises(
        DecodingError, match=f"checkpoint {first}, which is not there any more: .*remove .*parts to begin"
    ):
        settle(share(prompts, 0, 2, model=run))


def test_ranks_that_look_at_the_same_time_agree(prompts: Path, tmp_path: Path) -> None:
    """Two ranks of the first start that find another newest checkpoint each, as the run saves between them."""
    run, second, asked = tmp_path / "run", share(prompts, 1, 2, model=tmp_path / "run"), []
    first = checkpoint_of(run, 5)

    def slow(path: str) -> Loaded:
        asked.append(path)
        if len(asked) == 1:
            assert settle(share(prompts, 0, 2, model=run)) == str(first), "quicker"
            return Loaded(checkpoint_of(run, 10))
        return Loaded(Path(path))

    loaded = second.settle(slow)
    assert loaded is not None and loaded.path == first
    assert asked == [str(run), str(first)]


def test_weights_that_were_replaced_are_seen(prompts: Path, tmp_path: Path) -> None:
    """Half of an output by the model that lay in the folder before; or a copy of the model on another node's disk refused."""
    one = share(prompts, 0, 2)
    settle(one)
    os.utime(Path(one.model) / "model.safetensors", (1, 1))
    settle(one)
    model_of(Path(one.model), "weightz")
    with pytest.raises(
        DecodingError, match=r"whose files have changed since.*: bring those back, or remove .* to begin anew"
    ):
        settle(one)


def test_a_large_file_is_told_apart_by_its_ends_and_its_middle(tmp_path: Path) -> None:
    """Weights that differ behind their first bytes taken for the same."""
    path = tmp_path / "model.safetensors"
    content = bytearray(2**24 + 12345)
    digests = []
    for place in (None, 0, len(content) // 2, len(content) - 1):
        if place is not None:
            content[place : place + 100] = b"x" * len(content[place : place + 100])
        path.write_bytes(content)
        digests.append(digest_of(tmp_path))
    assert len(set(digests)) == 4


def test_what_comes_late_loads_no_model(prompts: Path) -> None:
    """A rank with nothing to do that loads a model, finds the parts gone, and begins all anew."""
    assert not work(share(prompts, 1, 2))

    def meanwhile(path: str) -> Loaded:
        assert work(share(prompts, 0, 2))
        return Loaded(Path(path))

    late = share(prompts, 1, 2)
    assert late.settle(meanwhile) is None
    assert not late.parts.exists() and len(result(prompts)) == 11
    assert late.settle(lambda path: pytest.fail("loaded")) is None


def test_the_parts_go_while_a_rank_begins(prompts: Path) -> None:
    """A rank with nothing left to do that ends in an error because another one has just written the output."""
    one, late = share(prompts, 0, 1), share(prompts, 1, 2)
    settle(one)
    settle(late)
    assert one.work(say, lambda: False, lambda *_: None)
    assert late.work(say, lambda: False, lambda *_: None)
    assert not late.parts.exists() and len(result(prompts)) == 11


def test_a_prompt_that_cannot_be_continued_is_named(prompts: Path) -> None:
    """An error of one prompt among thousands that does not say which."""

    def refuse(index: int, text: str) -> dict[str, Any]:
        if text == "p3":
            raise DecodingError("the prompt has 9 tokens, the model's context holds 8")
        return say(index, text)

    prompts.write_text("\n\n" + prompts.read_text())
    one = share(prompts, 1, 2)
    settle(one)
    with pytest.raises(PromptError, match=rf"^{prompts}:6: the prompt has 9 tokens, the model's context holds 8$"):
        one.work(refuse, lambda: False, lambda *_: None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "id": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"prompt": "a \\ud800 b"}', "has half a surrogate pair ('\\ud800')"),
        ('{"prompt": "a", "id": "\\udc00"}', "has half a surrogate pair ('\\udc00')"),
        ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"prompt": 3}', "expected an object"),
        ("[1]", "expected an object"),
        ('{"prompt": "a"', "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    """A stack trace for a bad line, after hours of work perhaps, when it is written again."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n\n{line}\n')
    with pytest.raises(DecodingError, match=re.escape(f"{path}:3: {words}")) as error:
        read_prompt_file(path)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (".", "is a folder"),
        ("prompts.jsonl/out.jsonl", "its folder cannot be made"),
        ("/proc/nowhere/out.jsonl", "its folder cannot be made"),
        ("file", "file.parts: not a folder that you may write to"),
        ("odd", "odd.parts: not a folder of parts"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(prompts: Path, output: str, words: str) -> None:
    """All prompts continued, and then a stack trace instead of an output."""
    prompts.with_name("file.parts").touch()
    prompts.with_name("odd.parts").mkdir()
    (prompts.with_name("odd.parts") / "something").touch()
    one = replace(share(prompts, 0, 1), output=prompts.parent / output)
    with pytest.raises(DecodingError, match=words):
        settle(one)


def test_an_output_of_something_else_is_left_alone(prompts: Path) -> None:
    """A file of a person's own replaced, because parts lie beside it."""
    one = share(prompts, 0, 1)
    settle(one)
    one.output.write_text("precious")
    with pytest.raises(DecodingError, match="already exists; name another --output, or remove it"):
        settle(one)
    assert one.output.read_text() == "precious"
