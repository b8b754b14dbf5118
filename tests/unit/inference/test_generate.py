"""The commands `generate` and `bench_decoding` on a checkpoint of a real, short run."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.checkpoint.loading import load_model
from recycle_ds.data.token_files import open_token_file
from recycle_ds.data.tokenizer import Tokenizer
from tests.runs import ROOT
from tests.unit.inference.command import PROMPT, Generate
from tests.unit.inference.conftest import DRAFT_VOCABULARY


def test_stdout_is_the_continuation_and_nothing_else(generate: Generate) -> None:
    """Prevents logs, figures or colours in text that a user pipes into a file."""
    plain = generate("--prompt", PROMPT, "--max-new-tokens", "20")
    as_json = generate("--prompt", PROMPT, "--max-new-tokens", "20", "--json")
    record = json.loads(as_json.out)
    assert (plain.code, as_json.code) == (0, 0)
    assert plain.out == record["text"] != ""
    assert len(record["token_ids"]) == record["new_tokens"] == 20
    for words in ("verified: 20 tokens (length)", "tokens/s", "tokens per full call"):
        assert words in plain.err and words in as_json.err
    for key in ("acceptance", "tokens_per_second", "full_calls", "module_calls", "finish_reason", "recycled"):
        assert key in record


def test_a_run_ranks_the_tokens_of_its_data(model: Path) -> None:
    """Prevents a draft vocabulary that is not that of the run's training data, and one that is lost when decoding."""
    loaded = load_model(str(model))
    tokens = open_token_file(model.parent / "corpus" / "train", loaded.tokenizer)
    counts = torch.bincount(torch.from_numpy(tokens.read(0, tokens.tokens)[0]), minlength=loaded.tokenizer.vocab_size)
    ids = loaded.model.draft_ids
    assert ids is not None and len(ids) == DRAFT_VOCABULARY
    others = torch.ones(len(counts), dtype=torch.bool).index_fill_(0, ids, False)
    assert counts[ids].min() >= counts[others].max() and counts[ids].min() > 0


def test_modes_agree_on_the_command_line(generate: Generate) -> None:
    """Prevents options that do not reach the decoder, and a lossless mode that changes tokens."""
    records: dict[str, dict[str, Any]] = {}
    for mode in ("autoregressive", "alternate", "verified"):
        drafts = () if mode == "autoregressive" else ("--draft-tokens", "2")
        arguments = ("--mode", mode, *drafts, "--max-new-tokens", "24", "--json", "--threads", "1")
        records[mode] = json.loads(generate("--prompt", PROMPT, *arguments).out)
    assert records["verified"]["token_ids"] == records["autoregressive"]["token_ids"]
    assert records["autoregressive"]["module_calls"] == 0
    assert records["alternate"]["full_calls"] == 8
    assert max(map(len, (records["verified"]["drafted"], records["alternate"]["drafted"]))) == 2


def test_a_seed_makes_sampling_reproducible(generate: Generate) -> None:
    """Prevents sampling options that are parsed and ignored."""
    sampling = ("--temperature", "1.2", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01")
    arguments = ("--prompt", PROMPT, *sampling, "--repetition-penalty", "1.1", "--max-new-tokens", "20")
    first, again, other = (generate(*arguments, "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == again != other


def test_stop_strings_cut_the_text(generate: Generate) -> None:
    """Prevents a stop string in the output, or one that is searched for only in single tokens."""
    text = generate("--prompt", PROMPT, "--max-new-tokens", "30").out
    stop = text[7:10]
    outcome = generate("--prompt", PROMPT, "--max-new-tokens", "30", "--stop", "never there", "--stop", stop)
    assert outcome.out == text[: text.index(stop)]
    assert "(stop)" in outcome.err


def test_the_prompt_from_a_file_or_stdin_is_unchanged(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a prompt whose spaces and line ends are changed."""
    raw = "  abcd\r\nefgh \n"
    (tmp_path / "prompt.txt").write_bytes(raw.encode())
    expected = generate("--prompt", raw, "--max-new-tokens", "8", "--json")
    from_file = generate("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "8", "--json")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw.encode())))
    from_stdin = generate("--prompt", "-", "--max-new-tokens", "8", "--json")
    tokens = [json.loads(outcome.out)["prompt_tokens"] for outcome in (expected, from_file, from_stdin)]
    ids = [json.loads(outcome.out)["token_ids"] for outcome in (expected, from_file, from_stdin)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_half_precision_runs(generate: Generate, dtype: str) -> None:
    """Prevents a type mismatch between weights, cache and rotary tables in bf16, and int8 from not reaching the weights."""
    outcome = generate("--prompt", PROMPT, "--dtype", dtype, "--max-new-tokens", "12", "--json")
    assert len(json.loads(outcome.out)["token_ids"]) == 12


def test_recycled_tokens_are_coloured_on_a_terminal_only(
    generate: Generate, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents recycled tokens that cannot be distinguished, or text that differs from the output to a pipe."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ("--prompt", PROMPT, "--mode", "alternate", "--max-new-tokens", "12")
    plain = generate(*arguments).out
    assert "\x1b" not in plain
    shown = _on_a_terminal(lambda: generate(*arguments))
    assert "\x1b[33m" in shown
    assert re.sub(r"\x1b\[\d+m", "", shown).replace("\r\n", "\n") == plain + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in _on_a_terminal(lambda: generate(*arguments))


def _on_a_terminal(action: Callable[[], object]) -> str:
    """Runs the action with a pseudo terminal as stdout, and returns its output.

    A single read may return only a part of the output. A thread therefore reads until the last writer has closed the
    terminal, which Linux reports as EIO.
    """
    master, slave = pty.openpty()
    pieces: list[bytes] = []
    reader = threading.Thread(target=_read_to_the_end, args=(master, pieces))
    reader.start()
    saved_fd = os.dup(1)
    os.dup2(slave, 1)
    os.close(slave)
    try:
        action()
    finally:
        os.dup2(saved_fd, 1)
        os.close(saved_fd)
        reader.join()
        os.close(master)
    return b"".join(pieces).decode()


def _read_to_the_end(master: int, pieces: list[bytes]) -> None:
    """Appends the data read from a pseudo terminal until its other side is closed."""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return
        if not piece:
            return
        pieces.append(piece)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "a", "--mode", "verifed"], "did you mean verified?"),
        (["--prompt", ""], "the prompt is empty"),
        ([], "give the prompt once"),
        (["--prompt", "a", "--prompt-file", "b"], "give the prompt once"),
        (["--prompt-file", "nowhere.txt"], "'nowhere.txt' cannot be read"),
        (["--prompt", "abcd " * 4000], "the model's context holds 4096"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "a", "--draft-tokens", "-2"], "draft_tokens=-2"),
        (["--prompt", "a", "--stop-token", "-1"], "stop_tokens: the token id -1 must be 0 or more"),
        (["--prompt", "a", "--logit-bias", "-3:1"], "logit_bias: the token id -3 must be 0 or more"),
        (
            ["--prompt", "a", "--mode", "alternate", "--logprobs", "2", "--json"],
            "logprobs=2: the model itself does not",
        ),
        (["--prompt", "a", "--answers", "2"], "several answers need --prompts FILE"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p=1.5"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "a", "--stop", ""], "must not be empty"),
        (["--prompt", "a", "--dtype", "fp8"], "must be one of fp32, bf16"),
        (["--prompt", "a", "--threads", "0"], "threads=0"),
        (["--prompt", "a", "--threads", "100000"], "threads=100000: this host has"),
        (["--prompt", "a", "--logprobs", "3"], "--logprobs 3: needs --json"),
        (
            ["--prompt", "a", "--mode", "autoregressive", "--draft-tokens", "2"],
            "--draft-tokens 2: --mode autoregressive makes no",
        ),
        (["--prompt", "a", "--tensor", "2"], "start 2 (torchrun --nproc-per-node 2"),
        (["--prompt", "a", "--top-k", "many"], "--top-k"),
        (["--prompt", "a", "--tempersture", "1"], "--tempersture"),
    ],
)
def test_errors_are_reported_on_one_line(generate: Generate, arguments: list[str], words: str) -> None:
    """Prevents a stack trace, or an exit code of success, for a typing error."""
    outcome = generate(*arguments)
    lines = outcome.err.splitlines()
    assert (outcome.code, outcome.out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ") and words in lines[0]


def test_a_folder_without_a_model_is_reported(generate: Generate, tmp_path: Path) -> None:
    """Prevents a stack trace for the most common mistake."""
    for folder in (str(tmp_path), str(tmp_path / "nowhere")):
        outcome = generate("--prompt", "a", folder=folder)
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)


def test_several_ranks_are_refused_once(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents every rank from decoding and printing the same text."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (
        (
            "0",
            "error: 2 ranks for one prompt, but --tensor x --pipeline = 1: start 1, raise the degrees, or decode a file of "
            "prompts (--prompts)\n",
        ),
        ("1", ""),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        outcome = generate("--prompt", "a", f"--local_rank={rank}")
        assert (outcome.code, outcome.out, outcome.err) == (2, "", expected)


def test_a_launcher_of_one_rank_changes_nothing(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents `deepspeed --num_gpus 1 --module recycle_ds.generate` from failing on the option it adds."""
    expected = generate("--prompt", PROMPT, "--max-new-tokens", "6").out
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    for option in (["--local_rank=0"], ["--local-rank", "0"]):
        assert generate("--prompt", PROMPT, "--max-new-tokens", "6", *option).out == expected


def test_an_interrupt_prints_text_and_figures(model: Path) -> None:
    """Prevents Ctrl-C from ending in a stack trace, or without the figures of what was produced."""
    command = [sys.executable, "-m", "recycle_ds.generate", "--model", str(model), "--prompt", PROMPT]
    options = ["--max-new-tokens", "4000", "--mode", "autoregressive"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, bufsize=0
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert re.search(r"autoregressive: \d+ tokens \(interrupted\) \| .* tokens/s", errors)
    assert len(first + rest) > 0


def test_an_interrupted_file_of_prompts_is_not_taken_for_finished(model: Path, tmp_path: Path) -> None:
    """Prevents `generate ... && next` from going on without an output after Ctrl-C, and prompts that are lost."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": PROMPT}) + "\n" for _ in range(40)))
    command = [sys.executable, "-m", "recycle_ds.generate", "--model", str(model), "--prompts", str(prompts)]
    options = ["--output", str(output), "--max-new-tokens", "200", "--max-batch", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stderr is not None
        while "of 40 prompts" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and not output.exists()
    assert errors.endswith("rank 0: stopped (SIGINT); the same command resumes\n")
    resumed = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0 and len(output.read_text().splitlines()) == 40, resumed.stderr


def test_the_bench_tool_writes_table_figures_and_plot(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a tool that measures and then fails to print or save the results."""
    prompts, report, plot = tmp_path / "prompts.jsonl", tmp_path / "decoding.json", tmp_path / "decoding.png"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "ghij")), encoding="utf-8")
    arguments = ["--model", str(model), "--prompts", str(prompts), "--max-new-tokens", "10", "--repeats", "1"]
    outputs = ["--json", str(report), "--plot", str(plot), "--threads", "1"]
    tool = str(ROOT / "tools" / "bench_decoding.py")
    monkeypatch.setattr(sys, "argv", [tool, *arguments, *outputs])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(tool, run_name="__main__")
    assert not exit_info.value.code
    out = capfd.readouterr().out
    modes = json.loads(report.read_text(encoding="utf-8"))["modes"]
    assert all(mode in out for mode in modes) and len(modes) == 3
    assert modes["verified"]["identical_to_autoregressive"] is True
    assert plot.stat().st_size > 10_000


def test_the_text_is_that_of_the_tokenizer(generate: Generate, model: Path) -> None:
    """Prevents text that loses or duplicates characters between streamed pieces."""
    record = json.loads(generate("--prompt", PROMPT, "--max-new-tokens", "40", "--json").out)
    tokenizer = Tokenizer.load(next((model / "checkpoints").glob("step-*")) / "tokenizer.json")
    assert record["text"] == tokenizer.decode(record["token_ids"])
