"""Reading prompts, holding some out, and excluding texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.self_text.exclusion import Exclusion, read_texts
from recycle_ds.inference.self_text.prompts import Prompt, read_prompts, select

QUESTION = (
    "How many eggs does a hen lay in seven weeks if she lays five eggs in every one of them, and none on Sundays?"
)


def write(path: Path, *lines: object) -> Path:
    """A jsonl file of objects, or a text file of lines."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_all_forms_of_prompts_are_read(tmp_path: Path) -> None:
    """Prevents prompts that are lost, or read as another form."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "Hello", "follow_ups": ["And then?"], "kind": "chat"},
        "",
        {"messages": messages},
        {"prompt": "Once upon", "raw": True},
    )
    found = read_prompts(path)
    assert [(one.form, one.where.rpartition(":")[2]) for one in found] == [
        ("prompt", "1"),
        ("messages", "3"),
        ("raw", "4"),
    ]
    assert (found[0].follow_ups, found[0].kind, found[1].content) == (("And then?",), "chat", messages)
    lines = read_prompts(write(tmp_path / "p.txt", "Hello", "", " Why? "))
    assert [(one.form, one.content) for one in lines] == [("prompt", "Hello"), ("prompt", "Why?")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"prompt": "a", "messages": []}', "not both"),
        ('{"question": "a"}', "not neither"),
        ('{"prompt": " "}', "not blank"),
        ('{"prompt": 3}', "must be a text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last one a user's"),
        ('{"messages": "a"}', "must be a list"),
        ('{"prompt": "a", "raw": true, "follow_ups": ["b"]}', "follow_ups"),
        ('{"prompt": "a", "raw": "yes"}', "raw must be"),
        ('{"prompt": "\\ud800"}', "unpaired surrogate"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    """Prevents a traceback, or hours of work with prompts that are not what the user meant."""
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(DecodingError, match=message) as found:
        read_prompts(path)
    assert str(found.value).startswith(f"{path}:2: ") and "\n" not in str(found.value)


def test_files_that_are_no_prompts_are_refused(tmp_path: Path) -> None:
    """Prevents a parquet file from being read as text, and an empty file from being taken for no file."""
    for path, message in (
        (tmp_path / "p.parquet", "must be a .jsonl"),
        (tmp_path / "none.jsonl", "cannot be read"),
        (write(tmp_path / "empty.txt", " "), "no prompts"),
    ):
        with pytest.raises(DecodingError, match=message):
            read_prompts(path)


def test_held_out_prompts_are_drawn_by_their_text() -> None:
    """Prevents prompts that are trained on and evaluated on, and a draw that depends on the order of the file."""
    prompts = [Prompt(f"f:{n}", "prompt", f"question {n % 20}") for n in range(30)]
    first = select(prompts, Exclusion(), 6, seed=1)
    assert (len(first.train), len(first.held_out), first.repeated) == (14, 6, 10)
    assert {one.content for one in first.train}.isdisjoint(one.content for one in first.held_out)
    again = select(prompts[::-1], Exclusion(), 6, seed=1)
    assert [one.content for one in again.held_out] == [one.content for one in first.held_out]
    assert select(prompts, Exclusion(), 6, seed=2).held_out != first.held_out
    with pytest.raises(DecodingError, match="of 20 in all"):
        select(prompts, Exclusion(), 20, seed=1)


def test_prompts_with_a_held_out_opening_are_not_trained_on() -> None:
    """Prevents an evaluation on questions that were trained on with other follow-ups, in another form or layout, or as the
    beginning of a chat."""
    prompts = [Prompt("f", "prompt", f"question {n}", (f"then {then}",)) for n in range(20) for then in range(3)]
    prompts += [Prompt("f", "raw", f"Question  {n}\n") for n in range(20)]
    prompts += [Prompt("f", "messages", [{"role": "system", "content": "Be brief."}, *chat]) for chat in (
        [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        for n in range(20)
    )]  # fmt: skip
    found = select(prompts, Exclusion(), 10, seed=0)
    openings = {one.opening for one in found.held_out}
    assert len(openings) == len(found.held_out) == 10
    assert openings.isdisjoint(one.opening for one in found.train)
    assert openings | {one.opening for one in found.train} == {f"question {n}" for n in range(20)}
    assert (len(found.train), found.beside_held_out) == (50, 40)
    assert select(prompts[::-1], Exclusion(), 10, seed=0).held_out == found.held_out
    with pytest.raises(DecodingError, match="of 20 in all"):
        select(prompts, Exclusion(), 20, seed=0)


@pytest.mark.parametrize(
    ("question", "other"),
    [
        (
            "小明有五个苹果，又买了三个苹果，请问他一共有多少个苹果？",
            "小明有五个朋友，他们一共买了三本书，请问每本多少钱？",
        ),
        ("りんごが五つあります。三つ買うと、全部でいくつになりますか。", "りんごを三つください。"),
        ("사과가 다섯 개 있고 세 개를 더 사면 모두 몇 개입니까?", "사과를 좋아합니다."),
        ("มีแอปเปิลห้าลูกซื้อเพิ่มอีกสามลูกรวมเป็นกี่ลูก", "แอปเปิลอร่อยมาก"),
    ],
    ids=["chinese", "japanese", "korean", "thai"],
)
def test_texts_without_spaces_are_recognised(question: str, other: str) -> None:
    """Prevents an exclusion that takes a sentence without spaces for one word and finds it only if nothing is around it."""
    exclusion = Exclusion([question])
    assert exclusion.matches(f"A: {question} B") and exclusion.matches(f"请回答：{question}谢谢")
    assert exclusion.matches(question.replace("，", "").replace("、", ""))
    assert not exclusion.matches(other)


def test_excluded_texts_are_recognised(tmp_path: Path) -> None:
    """Prevents questions of a benchmark among the prompts, in other case or layout or inside a longer text, and the
    exclusion of everything that shares a few words with one."""
    path = write(
        tmp_path / "bench.jsonl", {"turns": [QUESTION, "Explain it."], "id": 3}, {"question": "Who wrote the Iliad?"}
    )
    exclusion = Exclusion([*read_texts(path), "explain it", ""])
    assert exclusion.texts == 3, "texts that differ in punctuation are one"
    for text in (
        QUESTION,
        f"Please solve this:\n{QUESTION.upper().replace(' ', '  ')}\nThink first.",
        "who wrote the iliad",
        "Tell me: who wrote the Iliad, and when?",
        "explain it!",
    ):
        assert exclusion.matches(text), text
    for text in ("How many eggs does a hen lay in seven weeks?", "Who wrote it?", "Explain it to me, please.", ""):
        assert not exclusion.matches(text), text
    prompts = [Prompt("f:1", "prompt", "Fine"), Prompt("f:2", "prompt", "Fine too", ("Who wrote the Iliad?",))]
    found = select(prompts, exclusion, 0, seed=0)
    assert ([one.where for one in found.train], found.excluded) == (["f:1"], 1)
    with pytest.raises(DecodingError, match="all 1 prompts"):
        select(prompts[1:], exclusion, 0, seed=0)
    assert read_texts(write(tmp_path / "bench.txt", "a b", "", "c")) == ["a b", "c"]
