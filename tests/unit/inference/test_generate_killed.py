"""SIGKILL of `generate --prompts` at random moments: the resumed output equals the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.generate import main
from recycle_ds.inference.batch.parts import completed_lines
from tests.distributed import RankError, run_ranks

KILLS = 10 if os.environ.get("RECYCLE_TEST_ALL") == "1" else 3
PROMPTS = 40
# Operations on files while a job publishes its output: for the list of errors; until the output has its name; at least in all.
_OF_ERRORS, _UNTIL_OUTPUT, _PUBLISHING = 5, 8, 14
_WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompts of different lengths, of which two cannot be continued."""
    draw = random.Random(3)
    texts = [
        " ".join("".join(draw.choices("abcdefghij", k=4)) for _ in range(draw.randrange(1, 9))) for _ in range(PROMPTS)
    ]
    texts[5], texts[33] = "", "abcd " * 4000
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "id": f"p{n}"}) + "\n" for n, text in enumerate(texts)))
    return path


# The kills are shared between both cases.
@pytest.mark.parametrize(
    ("sampling", "kills"),
    [((), KILLS - KILLS // 2), (("--temperature", "1", "--seed", "11"), KILLS // 2)],
    ids=["greedy", "seeded"],
)
def test_a_killed_job_resumes_exactly(model: Path, prompts: Path, sampling: tuple[str, ...], kills: int) -> None:
    """Prevents prompts that are lost, repeated, decoded otherwise or out of place after kills, also while the output and
    the list of errors are published, and files that the killed processes leave for ever."""
    asked = ["--model", str(model), "--prompts", str(prompts), "--max-new-tokens", "24", "--max-batch", "4", *sampling]
    whole, killed = prompts.with_name("whole.jsonl"), prompts.with_name("killed") / "out.jsonl"
    assert run_ranks(generate, 1, [*asked, "--output", str(whole)], killed, None, None) == [1]
    draw = random.Random(f"{kills} {sampling}")
    while_publishing = kills // 2
    while_decoding = kills - while_publishing
    kept: dict[int, dict[str, Any]] = {}
    for number in range(kills):
        lines = operations = None
        if number < while_decoding:
            share = PROMPTS // (while_decoding + 1)
            lines = len(kept) + draw.randrange(1, share)
        else:
            operations = draw.randint(1, _PUBLISHING if number == kills - 1 else _UNTIL_OUTPUT)
        with pytest.raises(RankError, match="exited with code -9"):
            run_ranks(generate, 1, [*asked, "--output", str(killed)], killed, lines, operations)
        found = completed_lines(killed.with_name("out.jsonl.parts"))
        published = killed.exists() and not found
        assert published or found.items() >= kept.items(), "lines that were complete before must stay"
        kept |= found
        print(f"kill {number}: {lines} lines, {operations} operations; {len(found)} lines, output: {killed.exists()}")
    for _ in range(2):  # the second start finds a finished output
        assert run_ranks(generate, 1, [*asked, "--output", str(killed)], killed, None, None) == [1]
        assert answers(killed) == answers(whole)
    final = [json.loads(line) for line in killed.read_text().splitlines()]
    # figures of speed differ from start to start, so equal lines were not decoded again
    assert all(final[index].items() >= line.items() for index, line in kept.items())
    listed = [path.with_name(f"{path.name}.errors.jsonl").read_text() for path in (whole, killed)]
    assert listed[0] == listed[1] and [json.loads(line)["line"] for line in listed[0].splitlines()] == [6, 34]
    assert sorted(path.name for path in killed.parent.iterdir()) == ["out.jsonl", "out.jsonl.errors.jsonl"]


@pytest.mark.parametrize(("layout", "victim"), [("--tensor", 1), ("--pipeline", 0)])
def test_a_job_resumes_after_a_rank_of_a_team_was_killed(model: Path, prompts: Path, layout: str, victim: int) -> None:
    """Prevents lines that are lost or decoded otherwise where one of the ranks that hold a model together is killed, and a job
    that can only be resumed with the same ranks."""
    asked = ["--model", str(model), "--prompts", str(prompts), "--max-new-tokens", "24", "--max-batch", "4"]
    whole, killed = prompts.with_name("whole.jsonl"), prompts.with_name("killed") / "out.jsonl"
    assert run_ranks(generate, 1, [*asked, "--output", str(whole)], killed, None, None) == [1]
    own = [*asked, "--output", str(killed)]
    with pytest.raises(RankError, match=f"rank {victim} exited with code -9"):
        run_ranks(generate, 2, [*own, layout, "2"], killed, 12, None, victim)
    assert len(completed_lines(killed.with_name("out.jsonl.parts"))) >= 12
    assert run_ranks(generate, 1, own, killed, None, None) == [1]
    assert answers(killed) == answers(whole)


def answers(output: Path) -> list[tuple[Any, ...]]:
    """What must be equal in every line; speeds and drafts depend on measured costs."""
    keys = ("id", "prompt", "index", "text", "token_ids", "finish_reason", "error")
    return [tuple(json.loads(line).get(key) for key in keys) for line in output.read_text().splitlines()]


def generate(
    rank: int,
    world_size: int,
    arguments: list[str],
    output: Path,
    lines: int | None,
    operations: int | None,
    victim: int = 0,
) -> int:
    """Runs the command and returns its exit code. The victim kills its process by SIGKILL at a random moment after its parts
    have `lines` lines, or at an operation on files, `operations` after it has started to publish the output."""
    if lines is not None and rank == victim:
        threading.Thread(
            target=_die_at_lines, args=(output.with_name(f"{output.name}.parts"), lines), daemon=True
        ).start()
    if operations is not None:
        sys.addaudithook(_die_at_operation(output, operations))
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("main always exits")


def _die_at_lines(parts: Path, lines: int) -> None:
    while sum(part.read_bytes().count(b"\n") for part in parts.glob("part-*")) < lines:
        time.sleep(0.001)
    time.sleep(random.random() * 0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at_operation(output: Path, operations: int) -> Any:
    done = 0

    def watch(name: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if name not in _WATCHED or not isinstance(args[0], (str, os.PathLike)):
            return
        path = os.fspath(args[0])
        if done == 0 and path.endswith(f"-{output.name}"):
            done = _OF_ERRORS  # an earlier start has published the list
        elif done == 0 and not path.endswith(f"-{output.name}.errors.jsonl"):
            return
        if path.startswith(str(output.parent)):
            done += 1
            if done >= operations:
                os.kill(os.getpid(), signal.SIGKILL)

    return watch
