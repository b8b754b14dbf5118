"""Reads the commands that the documents show, and makes each of them small enough for a test."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT

FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "ds_configs" / "README.md")
PROGRAMS = (
    *("python", "recycle-ds", "torchrun", "deepspeed", "mpirun", "srun", "sbatch", "echo", "make", "git", "vllm"),
    "curl",
)
CLUSTER = ("srun", "sbatch")

# Commands that these tests do not run, by prefix, with the reason or the test that runs them.
ELSEWHERE = {
    "git clone": "needs a network; the tests are run from a clone",
    "make demo": "tests/end_to_end/test_demo.py",
    "make smollm2": "tests/end_to_end/test_smollm2.py",
    **dict.fromkeys(
        (
            "python -m recycle_ds.generate --model models/smollm2",
            "python tools/bench_decoding.py --model models/smollm2",
            "recycle-ds serve --model models/smollm2",
        ),
        "needs the shipped module: tests/end_to_end/test_smollm2.py; the model of these tests has none",
    ),
    "make gpu": "tests/unit/gpu_check/test_check.py",
    "make test": "runs these tests",
    "vllm serve": "needs vLLM, which is not a dependency; tests/unit/checkpoint/test_mimo.py checks the folder",
    "python -m sglang": "needs SGLang, which is not a dependency; tests/unit/checkpoint/test_mimo.py checks the folder",
    "python tools/fetch_smollm2.py": "tests/end_to_end/test_smollm2.py; these tests use a small model instead",
}
_PRETRAIN = (
    "training.steps=2 training.warmup_steps=1 training.micro_batch_size=1 training.global_batch_size=4 training.seq_length=32 "
    "training.eval_every=2 training.eval_batches=1 training.log_every=1 training.dry_run=false training.tensorboard=false"
)
# Options added to a command that contains the key, for fewer steps, tokens and documents.
SMALL = {
    "^retrofit_smollm2$": f"{_PRETRAIN} recycle.taps=[0,1]",  # of a smaller model
    "pretrain": _PRETRAIN,
    "my_observers": _PRETRAIN,
    "generate": "--max-new-tokens 6 --threads 1",
    "serve": "--threads 1 --max-batch 4",
    "evaluate": "--limit 2 --seq-length 32",
    "self_generate": "--tokens 300 --row-tokens 48 --max-batch 4 --min-tokens 4 --held-out 1 --dtype fp32 --threads 1",
    "bench_decoding": "--max-new-tokens 6 --repeats 1 --threads 1",
    "bench_server": "--max-new-tokens 6 --repeats 1 --requests 4 --threads 1",
    "bench_training": "--steps 1 training.seq_length=16 model.layers=1 model.hidden=64 model.heads=2 model.kv_heads=2 "
    "model.ffn=64 model.vocab_size=512",
}


@dataclass(frozen=True)
class Command:
    """A command of a document."""

    where: str
    """File and line."""
    text: str
    """The command as shown, with continued lines joined and without a trailing comment."""

    @property
    def program(self) -> str:
        return self.text.split()[0]

    @property
    def elsewhere(self) -> str | None:
        """Why these tests do not run the command, or what runs it instead; None for a command that they run."""
        return next((reason for prefix, reason in ELSEWHERE.items() if self.text.startswith(prefix)), None)

    @property
    def serves(self) -> bool:
        """Whether the command is a server: it runs until it is ended, and the commands after it ask it."""
        return re.search(r"(recycle_ds\.serve|recycle-ds serve)\b", self.text) is not None

    @property
    def added(self) -> str:
        """The options that make the command small; may be empty."""
        words = shlex.split(self.text)[:8]
        name = next((part for part in SMALL if any(re.search(rf"\b{part}\b", word) for word in words)), None)
        return SMALL[name] if name else ""

    @property
    def small(self) -> list[str]:
        """The words of the command with these options."""
        return shlex.split(f"{self.text} {self.added}")


def commands(file: Path) -> list[Command]:
    """The commands of a document: lines of fenced blocks without an info string. Blocks of output are marked `text`.

    Raises AssertionError for a line that does not start with one of PROGRAMS.
    """
    found: list[Command] = []
    block: str | None = None
    pending = ""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            block = line[3:] if block is None else None
        elif block == "" and line.strip() and not line.lstrip().startswith("#"):
            pending += line.removesuffix("\\")
            if line.endswith("\\"):
                continue
            where = f"{file.relative_to(ROOT)}:{number}"
            for part in pending.split("&&"):
                text = _without_comment(part)
                if not text.startswith("cd "):
                    assert text.split()[0] in PROGRAMS, (
                        f"{where}: {text!r} is not a known command; mark a block of output as text"
                    )
                    found.append(Command(where, text))
            pending = ""
    return found


def _without_comment(line: str) -> str:
    """The line up to a `#` that begins a comment; a `#` inside quotes does not."""
    return re.sub(r"""^((?:[^"'#]|"[^"]*"|'[^']*'|(?<! )\#)*?)\s*(?:\s\#.*)?$""", r"\1", line.strip()).strip()
