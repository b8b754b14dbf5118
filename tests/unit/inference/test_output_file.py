"""The output of a file of prompts: what it must not be, what it has of the prompts' records, and damage to it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.inference import SamplingParams
from recycle_ds.inference.batch import job
from recycle_ds.inference.batch.failures import ANSWER
from recycle_ds.inference.batch.prompts import read_lines
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import Generation
from recycle_ds.inference.request import Request
from recycle_ds.parallel.job import code_of_unfinished
from tests.unit.inference.prompt_files import result, settle, share, work


def edit(prompts: Path, **changes: Any) -> None:
    """Changes keys of all records."""
    lines = [json.loads(line) | changes for line in prompts.read_text().splitlines() if line.strip()]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("cut", [-1, -40, -1500, 0])
def test_an_output_that_was_damaged_is_not_complete(prompts: Path, cut: int) -> None:
    """Prevents "all prompts are done" for a file of which a part is missing."""
    assert work(share(prompts, 0, 1)) and settle(share(prompts, 0, 1)) is None
    output = prompts.with_name("out.jsonl")
    content = output.read_bytes()
    output.write_bytes(content[:cut])
    message = "damaged since it was written; restore it, or remove it" if cut else "already exists"
    with pytest.raises(DecodingError, match=message):
        settle(share(prompts, 0, 1))
    lines = content.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(DecodingError, match=f"has {len(lines) - 1} complete lines of {len(lines)}"):
        settle(share(prompts, 0, 1))


def test_keys_are_those_that_the_prompts_have_now(prompts: Path) -> None:
    """Prevents an output in which some lines have the keys of an earlier version of the prompts."""
    assert not work(share(prompts, 0, 1), most=4)
    edit(prompts, id="new", more=[1])
    assert work(share(prompts, 0, 1))
    assert {(line["id"], *line["more"]) for line in result(prompts)} == {("new", 1)}
    assert settle(share(prompts, 0, 1)) is None
    current = prompts.read_text()
    for changed in (
        current.replace('"new"', '"newer"'),
        current.replace(', "id": "new"', ""),
        current.replace("[1]", "[2]"),
    ):
        assert changed != current
        prompts.write_text(changed)
        with pytest.raises(DecodingError, match="had other keys beside the prompts; name another --output"):
            settle(share(prompts, 0, 1))


def test_parts_of_an_earlier_release(prompts: Path) -> None:
    """Prevents keys and answers that an earlier release wrote into the parts from being mixed with current ones."""
    assert not work(share(prompts, 0, 1), most=4)
    (part,) = prompts.with_name("out.jsonl.parts").glob("part-*")
    old = {"prompt": "p", "id": "old", "gone": 1, "logprobs": None}
    lines = [old | json.loads(line) for line in part.read_text().splitlines()]
    part.write_text("".join(json.dumps({key: one[key] for key in one if key != "logprobs"}) + "\n" for one in lines))
    edit(prompts, id="new")
    assert work(share(prompts, 0, 1)) and settle(share(prompts, 0, 1)) is None
    assert {line["id"] for line in result(prompts)} == {"new"} and not any("gone" in line for line in result(prompts))


def test_nothing_of_an_earlier_answer_stays_beside_a_new_one(prompts: Path) -> None:
    """Prevents log probabilities and further answers of one text beside another: an output is a file of prompts, too."""
    edit(prompts, logprobs=[[-1.0, []]], others=[{"text": "old"}], tokens_per_second=3.0, generated_by={"key": "old"})
    assert work(share(prompts, 0, 1)) and settle(share(prompts, 0, 1)) is None
    for line in result(prompts):
        assert line.keys() == {"prompt", "id", "text", "new_tokens", "index", "generated_by"}
        assert line["generated_by"]["key"] != "old"


def test_all_keys_of_an_answer_are_known() -> None:
    """Prevents keys of answers, added later, from being taken for the prompts' own."""
    generation = Generation((1,), (False,), "length", 1, 1, 0, (1,), (1,), (0,), 0.1, 0.1, ((-1.0, ()),), ())
    record = Request("model", "", "verified", "fp32", SamplingParams(), None)._record(generation, "text")
    assert {*record, "others"} == set(ANSWER)


def test_outputs_that_are_no_files(prompts: Path) -> None:
    """Prevents a start that waits for ever, deaf to signals, for somebody to write into a pipe; and advice to remove the
    prompts."""
    output = prompts.with_name("out.jsonl")
    os.mkfifo(output)
    with pytest.raises(DecodingError, match=r"out\.jsonl: is a pipe or a device; name a file"):
        settle(share(prompts, 0, 1))
    with pytest.raises(DecodingError, match="is a pipe or a device, and prompts are read at every start"):
        read_lines(output)
    output.unlink()
    output.symlink_to(prompts)
    with pytest.raises(DecodingError, match="is the file of prompts; name another --output"):
        settle(share(prompts, 0, 1))


@pytest.mark.parametrize("number", ["1e999", "-1e400"])
def test_numbers_that_no_json_has(tmp_path: Path, number: str) -> None:
    """Prevents an output that other programs cannot read: such a number is written as Infinity."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a", "weight": 1e300}}\n{{"prompt": "a", "weights": [{number}]}}\n')
    with pytest.raises(DecodingError, match=rf"prompts\.jsonl:2: cannot be read: {number} is larger than any number"):
        read_lines(path)


def test_a_second_interrupt_does_not_wait(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Prevents Ctrl-C that is ignored while thousands of answers to one prompt are decoded; a launcher passes on the signal
    that the terminal has sent as well, which must not count as a second one."""
    now = [100.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    with job._Stopping() as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.poll(0) == "SIGINT"
        assert (
            capfd.readouterr().err == "stopping when the answers under way are complete; Ctrl-C again stops at once\n"
        )
        now[0] += 1.5
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with job._Stopping() as stopping:  # another reason, which is not the user's, came first
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.poll(0) == "SIGTERM"
        monkeypatch.setenv("RECYCLE_JOB_DIR", "job")  # any number of signals to a batch job is one request
        now[0] += 1.5
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("reason", "environment", "code"),
    [
        ("SIGINT", {}, 130),
        ("SIGTERM", {}, 143),
        ("SIGTERM", {"RANK": "0"}, 143),
        ("SIGTERM", {"RANK": "1"}, 0),
        ("SIGTERM", {"RECYCLE_JOB_DIR": "job"}, 0),
        ("time limit", {}, 0),
        (None, {}, 0),
    ],
)
def test_an_output_that_is_not_there_is_no_success(reason: str | None, environment: dict[str, str], code: int) -> None:
    """Prevents `generate ... && use OUTPUT` from going on without the output; a job's shell knows from the job's notes."""
    assert code_of_unfinished(reason, environment) == code
