"""Prompts of a file that cannot be continued: their list of errors, and lines that cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.config import RecycleError
from recycle_ds.inference.batch.prompt_file import PromptFile
from recycle_ds.inference.batch.prompts import read_prompt_file
from recycle_ds.inference.errors import DecodingError
from tests.unit.inference.prompt_files import Loaded, continuation, result, settle, share

TOO_LONG = "the prompt has 9 tokens, the model's context holds 8"


def refusing(
    *refused: str,
) -> Callable[[Iterator[tuple[int, str]]], Iterator[tuple[int, dict[str, Any] | RecycleError]]]:
    """Continues prompts, except for these."""

    def generate(prompts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any] | RecycleError]]:
        for index, text in prompts:
            assert text, "an empty prompt has no tokens"
            if text in refused:
                yield index, DecodingError(TOO_LONG)
            else:
                yield from continuation(iter([(index, text)]))

    return generate


def finish(one: PromptFile, *refused: str, most: int = 1000) -> bool:
    left = iter(range(most))
    if one.settle(lambda path: Loaded(Path(path))) is None:
        return True
    return one.work(refusing(*refused), lambda: next(left, None) is None, lambda *_: None)


def listed(prompts: Path) -> list[dict[str, Any]]:
    text = prompts.with_name("out.jsonl.errors.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_prompts_that_cannot_be_continued_do_not_stop_the_others(prompts: Path) -> None:
    """Prevents a job that ends at one bad prompt of thousands, and failed prompts that are lost, repeated after a
    restart, named by the wrong line, or take the place of another line."""
    texts = [f"p{n}" for n in range(11)]
    texts[4] = ""
    prompts.write_text(
        "\n\n" + "".join(json.dumps({"prompt": text, "id": n * 7}) + "\n" for n, text in enumerate(texts))
    )
    assert not finish(share(prompts, 1, 2), "p3", most=2)
    with pytest.raises(FileNotFoundError):
        listed(prompts)
    assert not finish(share(prompts, 1, 2)), "p3 has failed and is not decoded again"
    assert finish(share(prompts, 0, 2), "p0")
    found = result(prompts)
    assert [(line["prompt"], line["id"], line["index"]) for line in found] == [(texts[n], n * 7, n) for n in range(11)]
    errors = {0: TOO_LONG, 3: TOO_LONG, 4: "the prompt is empty: give at least one character"}
    assert {line["index"]: line["error"] for line in found if "error" in line} == errors
    assert [line.get("text") for line in found] == [None if n in errors else f"p{n}!" for n in range(11)]
    expected = [
        {"prompt": texts[n], "id": n * 7, "index": n, "line": n + 3, "error": text} for n, text in errors.items()
    ]
    assert listed(prompts) == expected
    late = share(prompts, 3, 4)
    assert late.settle(lambda path: pytest.fail("loaded")) is None and late.failures() == 3
    prompts.with_name("out.jsonl.errors.jsonl").unlink()
    assert late.failures() == 3 and listed(prompts) == expected, "a removed list is written again"


def test_a_stale_list_of_errors_is_removed(prompts: Path) -> None:
    """Prevents errors of an output that was removed from being taken for those of the next one."""
    assert finish(share(prompts, 0, 1), "p3") and len(listed(prompts)) == 1
    prompts.with_name("out.jsonl").unlink()
    one = share(prompts, 0, 1)
    settle(one)
    assert not one.failures_path.exists()
    assert finish(one) and one.failures() == 0 and not one.failures_path.exists()


def test_a_list_of_errors_is_a_file_of_prompts(prompts: Path) -> None:
    """Prevents a continued prompt that looks failed, or the reverse, because its record came from an earlier output; and
    the loss of the list while it is the input."""
    prompts.write_text('{"prompt": "a", "text": "old", "token_ids": [1], "error": "old", "line": 9}\n' * 2 + "\n")
    assert finish(share(prompts, 0, 1), "a")
    assert all("text" not in line and "token_ids" not in line for line in result(prompts))
    assert [(line["line"], line["error"]) for line in listed(prompts)] == [(1, TOO_LONG), (2, TOO_LONG)]
    again = share(prompts.with_name("out.jsonl.errors.jsonl"), 0, 1)
    again.output.unlink()
    with pytest.raises(DecodingError, match="the list of failed prompts of this --output"):
        settle(again)
    assert len(listed(prompts)) == 2
    corrected = replace(again, output=prompts.with_name("corrected.jsonl"))
    assert finish(corrected) and corrected.failures() == 0
    lines = [json.loads(line) for line in corrected.output.read_text().splitlines()]
    assert [(line["text"], line["line"], "error" in line) for line in lines] == [("a!", 1, False), ("a!", 2, False)]


def test_an_unrelated_file_is_not_replaced_by_the_list_of_errors(prompts: Path) -> None:
    """Prevents the loss of a user's file that happens to have the name of the list."""
    one = share(prompts, 0, 1)
    one.failures_path.write_text('{"mine": 1}\n')
    with pytest.raises(DecodingError, match="exists with other contents; move it"):
        settle(one)
    assert one.failures_path.read_text() == '{"mine": 1}\n'


def test_a_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    """Prevents Python's own error, without the line, for a file that was written elsewhere."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DecodingError, match=re.escape(f"{path}:2: cannot be read: not valid UTF-8; convert it first")):
        read_prompt_file(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "id": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"prompt": "a \\ud800 b"}', "contains an unpaired surrogate ('\\ud800')"),
        ('{"prompt": "a", "id": "\\udc00"}', "contains an unpaired surrogate ('\\udc00')"),
        ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"prompt": 3}', "expected an object"),
        ("[1]", "expected an object"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": "a"', "not valid JSON"),
        ('{"prompt": "a", "x": NaN}', "cannot be read: NaN is not valid JSON: write null or a number"),
        ('{"prompt": "a", "x": [-Infinity]}', "cannot be read: -Infinity is not valid JSON: write null or a number"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    """Prevents a stack trace for an invalid line, possibly after hours, when the output is written."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n\n{line}\n')
    with pytest.raises(DecodingError, match=re.escape(f"{path}:3: {words}")) as error:
        read_prompt_file(path)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
