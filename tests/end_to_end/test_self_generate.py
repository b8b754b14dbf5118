"""A model writes text, through kills and with several processes, and a recycle module is trained on it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.run.init_from import init_from_defaults
from recycle_ds.config import parse_config
from recycle_ds.data.token_files import open_token_file
from recycle_ds.data.tokenizer import Tokenizer
from tests.distributed import RankError, run_ranks
from tests.end_to_end.self_generate import alone, is_final, killed, overtaken, self_generate, watched
from tests.in_the_wild.folders import edit_json
from tests.parallel.ranks import run_all
from tests.runs import make_corpus, read_metrics, zero
from tests.unit.checkpoint.families import save

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FILES = [f"{side}{suffix}" for side in ("train", "validation") for suffix in (".bin", ".idx", ".json", ".jsonl")]
KILLS = 8 if os.environ.get("RECYCLE_TEST_ALL") == "1" else 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with a chat template and without a recycle module."""
    root = tmp_path_factory.mktemp("self_generate")
    folder = root / "model"
    save("qwen3", folder)
    tokenizer = Tokenizer.load(make_corpus(root / "corpus", documents=20))
    tokenizer.save(folder)
    edit_json(folder / "config.json", eos_token_id=tokenizer.eos_id)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def asked(model: Path) -> list[str]:
    """Arguments of the command, without --output. One of the prompts is an excluded one."""
    prompts, questions = model.with_name("prompts.jsonl"), model.with_name("bench.txt")
    lines: list[dict[str, Any]] = [{"prompt": f"abc {n}", "kind": "word"} for n in range(9)]
    lines += [
        {"prompt": "abc", "follow_ups": ["def"]},
        {"prompt": "abc def", "raw": True},
        {"prompt": "Which of these is a quiz?"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions.write_text("Which of these is a quiz?\n")
    return [
        *("--model", str(model), "--prompts", str(prompts), "--exclude", str(questions), "--tokens", "1200", "--text"),
        *(
            "--held-out",
            "3",
            "--row-tokens",
            "60",
            "--max-batch",
            "4",
            "--min-tokens",
            "4",
            "--seed",
            "5",
            "--threads",
            "1",
        ),
    ]


@pytest.fixture(scope="module")
def whole(model: Path, asked: list[str]) -> Path:
    """The output of a job that was not interrupted."""
    output = model.with_name("whole")
    ((end, operations),) = run_ranks(watched, 1, [*asked, "--output", str(output)])
    assert end == (0, "")
    model.with_name("operations.json").write_text(json.dumps(operations))
    return output


@pytest.fixture(scope="module")
def phases(model: Path, whole: Path) -> tuple[int, int, int]:
    """Numbers of file operations of that job: before it writes the output, until the manifest has its name, after that."""
    operations = json.loads(model.with_name("operations.json").read_text())
    first = next(number for number, path in enumerate(operations) if is_final(path))
    # the manifest is opened and renamed under its temporary name, then the parts are removed
    last = max(number for number, path in enumerate(operations) if path.endswith("-self_text.json"))
    counts = first, last - first, len(operations) - last
    assert min(counts) > 2, operations
    return counts


def contents(output: Path) -> dict[str, bytes]:
    """All files of an output; of the manifest, what does not name the run."""
    found = {name: (output / name).read_bytes() for name in FILES}
    manifest = json.loads((output / "self_text.json").read_text())
    del manifest["provenance"]
    return found | {"manifest": json.dumps(manifest).encode()}


@pytest.mark.ranks
def test_a_killed_job_and_two_processes_write_the_same_text(
    model: Path, asked: list[str], whole: Path, phases: tuple[int, int, int]
) -> None:
    """Prevents rows that are lost, written twice or written otherwise (in bf16) after kills at any moment, and with another
    number of processes; and files that killed processes leave for ever."""
    output, two = model.with_name("killed"), model.with_name("two")
    writing, publishing, removing = phases
    draw = random.Random(KILLS)
    # the first start dies among the groups, the last one in the final phase, the others before the manifest has its name: every
    # one has at least as many operations until there as the final phase
    points = [(draw.randrange(writing), False)]
    points += [(draw.randrange(publishing), False) for _ in range(KILLS - 2)]
    points += [(draw.randrange(publishing + removing), True)]
    for number, final in points:
        with pytest.raises(RankError, match="exited with code -9"):
            run_ranks(killed, 1, [*asked, "--output", str(output)], number, final)
        left = sorted(path.name for path in output.glob("**/*") if path.is_file())
        print(f"kill at {number} of {phases}, final phase: {final}; left: {left}")
    for folder, ranks, starts in ((output, 1, 2), (two, 2, 1)):
        for _ in range(starts):  # the second one finds a complete output
            assert run_ranks(self_generate, ranks, [*asked, "--output", str(folder)]) == [(0, "")] * ranks
            assert_same(folder, whole)


def assert_same(output: Path, whole: Path) -> None:
    """An output is complete and nothing is beside it."""
    assert contents(output) == contents(whole)
    assert sorted(path.name for path in output.iterdir()) == sorted([*FILES, "self_text.json"])


@pytest.mark.ranks
def test_two_starts_of_one_command_complete_one_text(
    model: Path, asked: list[str], whole: Path, phases: tuple[int, int, int]
) -> None:
    """Prevents a traceback, and files that are lost, if a command is started twice without a launcher: each process is the
    first rank then, and publishes the text."""
    both = model.with_name("both")
    assert run_ranks(alone, 2, [*asked, "--output", str(both)]) == [(0, "")] * 2
    assert_same(both, whole)
    _, publishing, removing = phases
    for name, number in (("early", 2), ("late", publishing - 2), ("removing", publishing + removing // 2)):
        flags, output = model.with_name(f"{name}-flags"), model.with_name(name)
        flags.mkdir()
        assert run_ranks(overtaken, 2, [*asked, "--output", str(output)], number, flags) == [(0, "")] * 2
        assert_same(output, whole)


@pytest.mark.ranks
def test_the_text_is_what_was_asked_for(model: Path, whole: Path) -> None:
    """Prevents files that do not fit their manifest, excluded prompts in the text, and held-out prompts that are trained on."""
    manifest = json.loads((whole / "self_text.json").read_text())
    tokenizer = Tokenizer.load(model)
    sides = {}
    for side in ("train", "validation"):
        file = open_token_file(whole / side, tokenizer)
        sides[side] = [json.loads(line) for line in (whole / f"{side}.jsonl").read_text().splitlines()]
        assert (file.tokens, file.documents) == (manifest[side]["tokens"], manifest[side]["rows"])
        ids, starts = file.read(0, file.tokens)
        bounds = [*starts.tolist(), file.tokens]
        for row, start, end in zip(sides[side], bounds[:-1], bounds[1:], strict=True):
            assert ids[end - 1] == tokenizer.eos_id and end - start <= 61
            assert tokenizer.decode(ids[start : end - 1].tolist(), skip_special_tokens=False) == row["text"]
    assert 1200 <= manifest["train"]["tokens"] < 1200 + 61
    assert {row["temperature"] for row in sides["validation"]} == {0.0}
    assert {row["temperature"] for row in sides["train"]} == {0.0, 0.6, 1.0}
    assert {row["kind"] for row in sides["train"]} >= {"free", "word"}
    prompts = [
        {row["text"].partition("<|endoftext|>")[0] for row in rows if row["kind"] == "word"} for rows in sides.values()
    ]
    assert prompts[0].isdisjoint(prompts[1]) and prompts[1]
    assert not any("quiz" in row["text"] for rows in sides.values() for row in rows)
    assert (
        manifest["exclude"]["prompts"] == 1 and manifest["prompts"]["train"] + manifest["prompts"]["validation"] == 11
    )
    assert manifest["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert manifest["settings"]["temperatures"] == [0.0, 0.6, 1.0]


@pytest.mark.ranks
def test_a_module_is_trained_on_it(model: Path, whole: Path) -> None:
    """Prevents text that `pretrain` does not accept for the model that wrote it."""
    tree = {
        "run_dir": str(model.with_name("run")),
        "deepspeed": zero(1),
        "init_from": str(model),
        "data": {"train": [{"path": str(whole / "train")}], "validation": [{"path": str(whole / "validation")}]},
        "recycle": {"gradient": "frozen_backbone"},
        "training": {
            "steps": 3, "micro_batch_size": 2, "global_batch_size": 4, "seq_length": 40, "learning_rate": 5e-3, "log_every": 1,
            "eval_every": 3, "eval_batches": 1, "tensorboard": False,
        },
        "faults": {"hang_timeout": 0},
    }  # fmt: skip
    config = parse_config(tree, (), init_from_defaults)
    assert run_ranks(run_all, 1, [config]) == [["finished"]]
    lines = read_metrics(config.run_dir)
    assert len([line for line in lines if "loss" in line]) == 3 and any("eval_loss" in line for line in lines)


@pytest.mark.ranks
def test_wrong_requests_are_one_line(model: Path, asked: list[str], whole: Path, tmp_path: Path) -> None:
    """Prevents tracebacks, text of two settings in one folder, and outputs that replace other files."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.bin").write_text("")
    long, chats = tmp_path / "chats.jsonl", ["--prompts", str(tmp_path / "chats.jsonl")]
    long.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    cases = [
        ([*asked, "--output", str(whole), "--seed", "6"], "from another command"),
        ([*asked, "--output", str(tmp_path / "other")], "train.bin: already exists"),
        (
            [*asked, "--output", str(tmp_path / "a"), "--row-tokens", "100000"],
            "--row-tokens 100000: the model's context",
        ),
        ([*asked, "--output", str(tmp_path / "b"), "--mode", "verified"], "no recycle module"),
        ([*asked, "--output", str(tmp_path / "c"), "--held-out", "40"], "are not trained on"),
        ([*asked, "--output", str(tmp_path / "d"), *chats, "--raw", "--held-out", "0"], "chats.jsonl:1: a chat"),
        ([*asked, "--output", str(tmp_path / "e"), "--temperatures", "0", "--free", "0"], "1200: 8 prompts"),
        ([*asked, "--output", str(tmp_path / "f"), "--max-batch", "100000000"], "--max-batch 100000000"),
    ]
    ends = run_ranks(several, 1, [arguments for arguments, _ in cases])[0]
    for (code, error), (arguments, message) in zip(ends, cases, strict=True):
        assert (code, error.startswith("error: "), error.count("\n")) == (2, True, 0), error
        assert message in error, (error, arguments)
    assert not (tmp_path / "a" / "parts").exists(), "a refused command claims nothing"


def several(rank: int, world_size: int, requests: list[list[str]]) -> list[tuple[int, str]]:
    """Runs the command several times in one process."""
    return [self_generate(rank, world_size, arguments) for arguments in requests]
