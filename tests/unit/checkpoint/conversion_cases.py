"""A tiny Hugging Face folder with all tokenizer files, and functions that run the tools in this or another process."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from recycle_ds.data.tokenizer import Tokenizer
from tests.runs import ROOT
from tests.unit.checkpoint.families import save

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
Done = subprocess.CompletedProcess[str]


def model_folder(folder: Path, name: str = "llama") -> Path:
    """A model with a vocabulary of 300, its tokenizer and a chat template."""
    save(name, folder)
    Tokenizer.train(["a tale of two cities"], 257).save(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return folder


def run_tool(name: str, *arguments: object) -> Done:
    """Runs the command of tools/NAME.py in this process. Exceptions other than SystemExit fail the test."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return Done([name], code, out.getvalue(), err.getvalue())


def start_tool(name: str, *arguments: object, folder: Path) -> Done:
    """Runs tools/NAME.py in a separate process, in a folder. Takes seconds, for imports."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@contextlib.contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """Limits the size of files that this process and its children can write, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_line_error(done: Done) -> str:
    """The only line on stderr of a command that ended with a user error."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line
