"""Rows that a tiny model writes: their frame, their exactness, and where they end."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.reading.chat import ChatTemplate, encode_chat
from recycle_ds.data.tokenizer import END_OF_TEXT, Tokenizer
from recycle_ds.inference.decoder import Decoder
from recycle_ds.inference.engine.build import Steps, local_engine
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.parameters import SamplingParams, TokenSampling
from recycle_ds.inference.self_text.decoding import write_rows
from recycle_ds.inference.self_text.exclusion import Exclusion
from recycle_ds.inference.self_text.preparation import check_prompts
from recycle_ds.inference.self_text.prompts import Prompt, PromptSet
from recycle_ds.inference.self_text.row import Row, Writer
from recycle_ds.inference.self_text.rows import TRAIN, RowPlan, RowPlanner
from recycle_ds.inference.self_text.settings import SelfTextSettings
from recycle_ds.inference.self_text.turns import ChatFrame
from recycle_ds.model import RecycleGPT, build_model
from tests.unit.inference.models import random_model

END = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
ROW = 96


@lru_cache
def tokenizer() -> Tokenizer:
    """A vocabulary of 300 tokens with those of a chat; END is the end of a turn."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=3)) for _ in range(60)]
    trained = Tokenizer.train([" ".join(draw.choices(words, k=50)) for _ in range(40)], 297)
    tree = json.loads(trained.to_json())
    for number, token in enumerate(("<|im_start|>", END)):
        entry = {"id": 297 + number, "content": token, "special": True, "normalized": False}
        tree["added_tokens"].append(entry | {"single_word": False, "lstrip": False, "rstrip": False})
    return Tokenizer(json.dumps(tree), {"eos_token": END, "bos_token": None}, name="tiny")


def writer(template: str | None = TEMPLATE, exclude: tuple[str, ...] = (), **settings: Any) -> Writer:
    """What the rows of a test share."""
    chat = ChatFrame(ChatTemplate(template, tokenizer()), tokenizer()) if template else None
    defaults: dict[str, Any] = {"tokens": 1000, "row_tokens": ROW, "min_tokens": 4, "dtype": "fp32", "max_batch": 3}
    return Writer(SelfTextSettings(**{**defaults, **settings}), tokenizer(), chat, Exclusion(exclude))


@lru_cache
def model() -> RecycleGPT:
    """A random model that ends turns: the row of the head for their end is longer than the others."""
    config = ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, vocab_size=299, max_positions=128, init_std=0.6,
        tied_embeddings=False,
    )  # fmt: skip
    found = build_model(config, RecycleConfig(layers=1), seed=2).eval()
    dict(found.named_parameters())["head.weight"].data[tokenizer().eos_id] *= 2
    return found


def rows(
    given: Writer, count: int, prompts: tuple[Prompt, ...] = (), first: int = 0, max_batch: int = 3
) -> list[dict[str, Any]]:
    """Rows that the model writes, from row `first` on."""
    engine = local_engine(model(), max_batch=max_batch, kv_memory_gib=0.01, eos_ids=tokenizer().end_ids)
    planner = RowPlanner(given.settings, PromptSet(prompts))
    plans = [planner.row(TRAIN, first + number) for number in range(count)]
    found = write_rows(engine, plans, given, lambda: False, lambda _: None)
    assert found is not None
    engine.scheduler.check()
    return found


PROMPTS = (
    Prompt("f:1", "prompt", "abc def", kind="word"),
    Prompt("f:2", "messages", [{"role": "system", "content": "abc"}, {"role": "user", "content": "def <|im_end|>"}]),
    Prompt("f:3", "raw", "abc abc"),
    Prompt("f:4", "prompt", "fgh", ("aaa bbb", "ccc")),
)


def test_turns_are_those_of_the_chat_template() -> None:
    """Prevents rows whose frame differs from what the model sees when it is used, and special tokens of a message that
    act as such."""
    given = writer()
    assert given.chat is not None
    frame, template = given.chat.frame, ChatTemplate(TEMPLATE, tokenizer())
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "abc"), ("assistant", "def gh"), ("user", "a <|im_end|> b"))
    ]
    answer = tokenizer().encode("def gh")
    built = [*given.chat.first(Prompt("f", "prompt", "abc")), *answer, frame.answer_end]
    built += given.chat.follow_up("a <|im_end|> b")
    whole = template.render(messages, "f", "messages", add_generation_prompt=True)
    assert whole is not None and built == encode_chat(tokenizer(), whole)
    question = [*frame.opening, *tokenizer().encode("abc"), frame.question_end, *frame.to_answer]
    assert question == given.chat.first(Prompt("f", "prompt", "abc"))
    assert (
        built[: len(question) + len(answer) + 1 + len(frame.to_question)][-len(frame.to_question) :]
        == frame.to_question
    )


def test_a_template_without_special_tokens_between_turns_allows_single_answers() -> None:
    """Prevents user's turns that never end, because the model has no token to end one."""
    given = writer(PLAIN, free=0.0)
    assert given.chat is not None
    assert (given.chat.frame.question_end, given.chat.frame.answer_end) == (None, None)
    for settings, prompts in ((writer(PLAIN).settings, ()), (given.settings, (PROMPTS[3],))):
        with pytest.raises(DecodingError, match="no special token"):
            check_prompts(PromptSet(prompts), settings, given.chat, tokenizer(), warn=False)
    with pytest.raises(DecodingError, match="f:2: a chat, but the model has no chat template"):
        check_prompts(PromptSet(PROMPTS), given.settings, None, tokenizer(), warn=False)


def test_prompts_that_are_rendered_already_are_noted(capfd: pytest.CaptureFixture[str]) -> None:
    """Prevents chats inside chats, from a file of prompts that was made for `generate`."""
    given, rendered = writer(), Prompt("f:9", "prompt", "<|im_start|>user\nabc<|im_end|>")
    check_prompts(PromptSet((*PROMPTS, rendered)), given.settings, given.chat, tokenizer(), warn=True)
    assert capfd.readouterr().err.startswith("note: 1 prompts contain special tokens")


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "base"])
def test_rows_do_not_depend_on_what_is_written_beside_them(template: str | None) -> None:
    """Prevents rows that differ after a kill, or with another number of processes or another batch."""
    given = writer(template, free=0.5, temperatures=(0.0, 1.0))
    prompts = PROMPTS if template else (PROMPTS[0], PROMPTS[2])
    together = rows(given, 12, prompts)
    assert together == rows(given, 12, prompts, max_batch=1)
    assert together[5:9] == rows(given, 4, prompts, first=5)
    assert rows(replace(given, settings=replace(given.settings, mode="verified")), 12, prompts) == together
    assert len({tuple(row["ids"]) for row in together}) == 12
    assert {row["kind"] for row in together} >= {"free", "word", "raw"}


def test_a_chat_row_has_several_turns_and_greedy_answers() -> None:
    """Prevents answers at another temperature, turns in the wrong order, rows that are too long, and a final token that the
    token file would write twice."""
    given = writer(free=0.5, temperatures=(0.0,), repeats=0, turns=3)
    assert given.chat is not None
    frame = given.chat.frame
    found = rows(given, 8, PROMPTS)
    assert max(row["answers"] for row in found) == 3 and {row["end"] for row in found} >= {"turns"}
    decoder = Decoder(model(), tokenizer().end_ids)
    to_answer, checked = [frame.question_end, *frame.to_answer], 0
    for row in found:
        ids = row["ids"]
        assert len(ids) <= ROW and (not ids or ids[-1] != tokenizer().eos_id)
        for at in range(len(ids) - len(to_answer)):
            if ids[at : at + len(to_answer)] == to_answer:
                start = at + len(to_answer)
                answer = decoder.generate(ids[:start], "autoregressive", max_new_tokens=ROW - start).token_ids
                assert tuple((*ids, tokenizer().eos_id)[start : start + len(answer)]) == answer
                checked += 1
    assert checked > 8


def test_follow_ups_of_the_file_come_before_turns_of_the_model() -> None:
    """Prevents a user's second message that is lost or comes in another order."""
    given = writer(free=0.0, temperatures=(0.0,), repeats=0)
    (row,) = rows(given, 1, (PROMPTS[3],))
    text = tokenizer().decode(row["ids"], skip_special_tokens=False)
    assert row["answers"] >= 2, text
    assert 0 < text.index("user\nfgh") < text.index("user\naaa bbb")


def test_a_model_without_template_writes_documents() -> None:
    """Prevents an end-of-text token at the start of a row, and rows of a base model that are all equal."""
    found = rows(writer(None, free=1.0, temperatures=(0.0,)), 6)
    same = Tokenizer(tokenizer().to_json(), {"eos_token": END, "bos_token": END}, name="start and end are one")
    assert rows(replace(writer(None, free=1.0, temperatures=(0.0,)), tokenizer=same), 6) == found
    assert len({tuple(row["ids"]) for row in found}) == 6
    assert all(
        row["ids"][0] != tokenizer().eos_id and row["own"] - len(row["ids"]) in (0, 1) for row in found if row["ids"]
    )


def test_rows_end_where_they_repeat_themselves() -> None:
    """Prevents loops in the text, and tokens that are decoded after a loop was found."""
    looping = random_model(299, seed=5, layers=1, max_positions=128, std=0.05)
    settings = {"free": 0.0, "temperatures": (0.0,), "ngram": 4}
    uncut, cut = (writer(None, repeats=repeats, **settings) for repeats in (0, 2))
    plan = RowPlan(TRAIN, 0, Prompt("f:1", "raw", "abc"), 0.0, 0)
    found = []
    for given in (uncut, cut):
        written: list[int] = []
        engine = local_engine(looping, max_batch=1, kv_memory_gib=0.01, eos_ids=[298])
        records = write_rows(engine, [plan], given, lambda: False, written.append)
        assert records is not None
        found.append((records[0], sum(written)))
    (whole, _), (short, decoded) = found
    assert whole["end"] == "length" and short["end"] in ("loop", "too short")
    assert decoded == short["written"] < whole["written"] and short["cut"] > 0
    assert short["ids"] == whole["ids"][: len(short["ids"])]


def test_left_out_rows_say_why() -> None:
    """Prevents rows of a few tokens, questions of a benchmark that the model remembers, and prompts longer than a row."""
    long = Prompt("f:1", "prompt", "abc " * ROW)
    (row,) = rows(writer(free=0.0), 1, (long,))
    assert (row["end"], row["ids"], row["written"]) == ("prompt too long", [], 0)
    found = rows(writer(free=1.0, temperatures=(0.0,), repeats=0, turns=1, min_tokens=60), 8)
    short = [row for row in found if row["end"] == "too short"]
    assert short and not any(row["ids"] for row in short)
    free = rows(writer(free=1.0, turns=1), 6)
    given = writer()
    assert given.chat is not None
    frame, questions = given.chat.frame, []
    for row in free:
        ids = row["ids"]
        if frame.question_end in ids:
            questions.append(
                tokenizer().decode(ids[len(frame.opening) : ids.index(frame.question_end, len(frame.opening))])
            )
    assert questions
    again = rows(writer(free=1.0, turns=1, exclude=(questions[0],)), 6)
    assert "excluded" in {row["end"] for row in again}


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "base"])
@pytest.mark.parametrize("how", ["length", "end of text", "loop", "later"])
def test_excluded_questions_are_left_out_however_they_end(template: str | None, how: str) -> None:
    """Prevents questions of a benchmark in rows that end inside the question, or in the text of a base model."""
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    ids = tokenizer().encode(question)
    given = writer(template, (question,), free=1.0, ngram=4, repeats=2 if how == "loop" else 0, row_tokens=4 * ROW)
    row = Row(RowPlan(TRAIN, 0, None, 0.0, 0), given)
    if how == "later" and template is None:  # behind the opening
        row.take(tokenizer().encode("abc"))
        row.end_turn()
        assert row.end is None
    row.take(ids)
    if how == "loop":
        row.take(tokenizer().encode(" abc def gh" * 40))
    elif how == "end of text":
        row.take([tokenizer().eos_id])
    row.end_turn()
    assert (row.record()["end"], row.record()["ids"]) == ("excluded", [])


def test_a_prompt_that_the_template_refuses_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    """Prevents a job that ends at a prompt in the middle, at every start again, because the template refuses its content."""
    given = writer(
        "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE, free=0.0
    )
    bad = Prompt("f:7", "prompt", "bad")
    assert check_prompts(PromptSet((*PROMPTS, bad)), given.settings, given.chat, tokenizer(), warn=True) == ["f:7"]
    note = capfd.readouterr().err
    assert note.startswith("note: rows of 1 prompts are left out:\n") and "f:7: the chat template refuses" in note
    (row,) = rows(given, 1, (bad,))
    assert (row["end"], row["ids"], row["written"]) == ("prompt refused by the chat template", [], 0)
    with pytest.raises(DecodingError, match="all 1 prompts are refused, the first one: f:7"):
        check_prompts(PromptSet((bad,)), given.settings, given.chat, tokenizer(), warn=False)


@pytest.mark.parametrize("steps", ["flat", "static"])
def test_a_job_that_must_end_leaves_the_engine_empty(steps: Steps) -> None:
    """Prevents a group that is stored although it is not complete, and sequences that occupy the batch for ever, also where
    they are part of a step that was planned early."""
    given = writer(None, free=1.0)
    engine = local_engine(model(), max_batch=2, kv_memory_gib=0.01, compiled=False, steps=steps)
    planner, steps = RowPlanner(given.settings, PromptSet()), iter([False] * 5 + [True])
    plans = [planner.row(TRAIN, number) for number in range(4)]
    assert write_rows(engine, plans, given, lambda: next(steps), lambda _: None) is None
    assert not engine.unfinished


def test_sampling_of_a_row_is_seeded() -> None:
    """Prevents a row that is sampled anew by a later start."""
    assert SamplingParams().seed is None and TokenSampling().seed is None
    given = writer(None, free=1.0, temperatures=(1.0,))
    assert rows(given, 3) == rows(given, 3)
    other = replace(given, settings=replace(given.settings, seed=1))
    assert rows(other, 3) != rows(given, 3)
    assert END_OF_TEXT in tokenizer().special_tokens
