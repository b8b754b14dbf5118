"""The commands as users start them: imports, any working directory, interrupts, full disks, tables in a pipe."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ds.cli import COMMANDS
from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.config.command import shown_command
from recycle_ds.config.shipped import RUNS, find_config, names
from tests.runs import ROOT
from tests.unit.interpreter import RUN, python


def test_importing_the_package_imports_nothing_else() -> None:
    """Prevents `import recycle_ds` from taking seconds because it imports torch."""
    done = python(
        "import recycle_ds, sys; print([n for n in ('torch', 'pydantic', 'typer', 'numpy') if n in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr
    done = python("import recycle_ds; print(recycle_ds.Engine, recycle_ds.SamplingParams(temperature=0))")
    assert done.returncode == 0 and "Engine" in done.stdout, done.stderr
    assert "Warning" not in done.stderr, "megatron-core's warnings must not reach the user"
    assert "no attribute 'Engin'" in python("import recycle_ds; recycle_ds.Engin").stderr


def test_a_shown_command_can_be_copied(tmp_path: Path) -> None:
    """Prevents advice that fails in a shell because of a space, or because another interpreter lacks the package."""
    words = ["--model", "my models/$a b", "--prompt", "The Congress"]
    shown = shown_command("recycle_ds.generate", *words)
    assert shlex.split(shown)[1:] == ["-m", "recycle_ds.generate", *words] and '"The Congress"' in shown
    assert "'my models/$a b'" in shown
    assert os.path.samefile(shlex.split(shown)[0], sys.executable)


def test_an_interrupted_demo_says_how_to_continue() -> None:
    """Prevents a user from starting over because the interrupted demo says nothing."""
    code = """
from recycle_ds import demo
def interrupted(*_):
    raise KeyboardInterrupt
demo.load_config = interrupted
demo.main([])
"""
    done = python(code)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["interrupted; the next `make demo` continues from the newest checkpoint"]


def test_ctrl_c_ends_the_training_of_a_tokenizer(tmp_path: Path) -> None:
    """Prevents an abort (SIGABRT), or a wait of seconds, if the training of a tokenizer is interrupted."""
    code = """
import os, signal, sys, threading
from recycle_ds.data import tokenizer_command, sources
def endless(*_, **__):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        yield "we the people of the united states " * 50
sources.read_documents = endless
tokenizer_command.main(["shipped", "--output", sys.argv[1], "--vocab-size", "300"])
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, timeout=60, check=False,
            cwd=ROOT,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (130, "interrupted; nothing was written\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_output_to_a_full_disk_is_one_line(size: int) -> None:
    """Prevents a traceback, or an error of the interpreter after its end, if the output cannot be written."""
    code = f"""
import typer
from recycle_ds.config.command import run_command
application = typer.Typer()
@application.command()
def command() -> None:
    print("x" * {size})
run_command(application, [])
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(ROOT)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: the output or a file: No space left on device; free space there, or name another place"
    ]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an error that names no file, or a temporary one."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path / 'a.json'}'")):
        write_atomically(tmp_path / "a.json", "text")


def test_shipped_configurations_are_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a console script that works only in the repository's root, and shipped files that hide a user's file."""
    shipped = ROOT / "ds_configs" / "runs"
    assert names(RUNS) == sorted(path.stem for path in shipped.glob("*.yaml")) and len(names(RUNS)) >= 7
    monkeypatch.chdir(tmp_path)
    assert names(RUNS) == sorted(path.stem for path in shipped.glob("*.yaml"))
    for name in ("demo", "ds_configs/runs/demo.yaml"):
        assert find_config(name, RUNS).samefile(shipped / "demo.yaml")
    assert find_config("recyclegpt_1.3b", RUNS).is_file(), "a name that contains a dot"
    assert find_config("unknown", RUNS) == Path("unknown") and not find_config("runs/demo", RUNS).is_file()
    Path("demo").write_text("mine")
    assert find_config("demo", RUNS).read_text() == "mine"
    done = python("from recycle_ds.cli import main; main(['pretrain', '--config', '7b', 'model.layrs=3'])", tmp_path)
    assert done.stderr.splitlines() == ["error: model.layrs=3: unknown key, did you mean model.layers?"]


def test_every_subcommand_has_its_own_help() -> None:
    """Prevents a listed command that does not exist."""
    for command, (module, line) in COMMANDS.items():
        done = python(RUN.format(module="recycle_ds.cli", arguments=[command, "--help"]))
        assert done.returncode == 0 and f"recycle-ds {command}" in done.stdout, (module, done.stderr)
        assert line and done.stderr.splitlines()[-1] == "[]"


def test_a_table_in_a_pipe_is_not_truncated() -> None:
    """Prevents columns truncated to "…" in logs and files because a pipe is treated as a narrow terminal."""
    code = """
from rich.table import Table
from recycle_ds.config.console import output_console
table = Table(*(f"a heading of some length, number {n}" for n in range(12)))
table.add_row(*("x" * 40 for _ in range(12)))
output_console().print(table)
"""
    for columns in ("20", "80"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": columns}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert "…" not in done.stdout and len(done.stdout.splitlines()) == 5
        assert done.stdout.count("x" * 40) == 12


def test_tables_are_printed_through_one_console() -> None:
    """Prevents a new table that is truncated in a log because it uses its own console."""
    own = [
        f"{file.relative_to(ROOT)}:{number}"
        for folder in ("recycle_ds", "tools")
        for file in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(r"\bConsole\(", line)
    ]
    assert [line.partition(":")[0] for line in own] == ["recycle_ds/config/console.py"]
