"""Runs every command that README.md and docs/ show, with options for a small size, in a separate folder."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ds.data.sources import read_documents
from tests.distributed import free_port, run_ranks
from tests.documents import CLUSTER, ELSEWHERE, FILES, PROGRAMS, SMALL, Command, commands
from tests.runs import ROOT, figures
from tests.served import DocumentServer

ALL = [command for file in FILES for command in commands(file)]
RUN = [command for command in ALL if command.elsewhere is None and command.program not in CLUSTER]


def forked(rank: int, world_size: int, words: list[str], folder: str, is_rank: bool = False) -> tuple[int, str, str]:
    """Runs `python ...` or `recycle-ds ...` in this process. Returns its exit code, stdout and stderr.

    is_rank: whether this process is a rank of a launcher; otherwise a launcher's variables are removed.
    """
    from recycle_ds.parallel import rendezvous

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not is_rank:
            os.environ.pop(name, None)
    os.chdir(folder)
    code: object = 0
    files = [open(os.path.join(folder, name), "w+b") for name in (f".tmp-stdout-{rank}", f".tmp-stderr-{rank}")]  # noqa: SIM115
    for number, file in enumerate(files, start=1):
        os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(os.dup(n), "wb"), write_through=True) for n in (1, 2))
    # exit_process would end this process before it has returned its result
    leave, rendezvous.exit_process = rendezvous.exit_process, sys.exit
    try:
        if words[0] == "recycle-ds":
            from recycle_ds.cli import main

            main(words[1:])
        elif words[1] == "-m":
            sys.path.insert(0, folder)  # as `python -m` does
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        rendezvous.exit_process = leave
    sys.stdout.flush()
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
    return int(code) if isinstance(code, int) else 1, texts[0], texts[1]


def in_shell(command: Command, folder: Path) -> tuple[int, str, str]:
    """Runs a launcher, or a command that needs a shell, as a user does."""
    return run_line(shell_line(command), folder)


def shell_line(command: Command) -> str:
    """The command for a shell. Other tests may use the default port, and the `deepspeed` on the PATH may belong to another
    environment."""
    line = f"{command.text} {command.added}"
    line = re.sub("^deepspeed", f"python -m deepspeed.launcher.runner --master_port {free_port()}", line)
    return re.sub("^torchrun", f"torchrun --master-port {free_port()}", line)


def run_line(line: str, folder: Path) -> tuple[int, str, str]:
    """Runs a line of a shell."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=shell_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def shell_environment() -> dict[str, str]:
    """The environment of a user's shell, with this repository's package and programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


_LAUNCHER = re.compile(r"^(torchrun --nproc-per-node 2|deepspeed --num_gpus 2) (-m |--module )?")


def run(command: Command, folder: Path, launched: set[str], server: DocumentServer) -> tuple[int, str, str]:
    """Runs a command. Returns its exit code, stdout and stderr.

    server: starts the command if it is one that serves, and is what `curl` asks. launched: launchers that have run once. For
    later commands of the same launcher, ranks are forked from the harness's server instead, with the variables that
    torchrun sets.
    """
    if command.serves:
        problem = server.start(shell_line(command))
        return (0, "", "") if problem is None else (1, "", problem)
    if command.program == "curl":
        if shutil.which("curl") is None:
            return 0, "curl is not installed", ""
        return run_line(f"{server.asked(command.text)} --fail-with-body --silent --show-error", folder)
    launcher = _LAUNCHER.match(command.text)
    if launcher and launcher[1] in launched:
        program = f"python {'-m ' if launcher[2] else ''}{command.text[launcher.end() :]} {command.added}"
        results = run_ranks(forked, 2, shlex.split(program), str(folder), True, timeout=240)
        code = next((code for code, *_ in results if code), 0)
        return code, results[0][1], "".join(errors for *_, errors in results)
    if launcher:
        launched.add(launcher[1])
    if command.program in ("python", "recycle-ds") and not re.search(r"[|<>*;`$]", command.text):
        return run_ranks(forked, 1, shlex.split(f"{command.text} {command.added}"), str(folder), timeout=240)[0]
    return in_shell(command, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the documents assume it: the repository's files, texts, prompts, a demo run and a converted model."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("ds_configs", "tools", "slurm", "recycle_ds", "docs"):
        (folder / name).symlink_to(ROOT / name)
    texts = list(itertools.islice(read_documents("shipped"), 8))
    for name in ("my_texts", "my_code"):
        (folder / name).mkdir()
        for number, text in enumerate(texts[: 8 if name == "my_texts" else 4]):
            (folder / name / f"{number}.txt").write_text(text, encoding="utf-8")
    for name in ("runs", "models"):
        (folder / name).mkdir()
    small = SMALL["pretrain"].split()
    demo = ["python", "-m", "recycle_ds.pretrain", "--config", "demo", *small]
    plain = [*demo, "run_dir=runs/plain", "recycle.layers=0", "model.layers=2", "model.max_positions=64"]
    convert = ["recycle-ds", "convert", "runs/plain", "models/smollm2", "--to", "hf"]
    sweep = [*demo, "run_dir=runs/my_sweep/base"]
    for words in (demo, plain, convert, sweep):
        code, out, err = run_ranks(forked, 1, words, str(folder), timeout=240)[0]
        assert code == 0, out + err
    example = (
        (ROOT / "docs" / "observers.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    )
    (folder / "my_observers.py").write_text(example, encoding="utf-8")
    for path in ("prompts.jsonl", "runs/demo/prompts.jsonl"):  # a file of the user's, and what `make demo` leaves
        (folder / path).write_text('{"prompt": "The Congress"}\n{"prompt": "The Union"}\n')
    return folder


def test_the_documents_show_commands() -> None:
    """Prevents the test below from running no command, and a command from being skipped without a reason."""
    assert len(RUN) > 35 and {command.program for command in ALL} == set(PROGRAMS)
    assert {reason for command in ALL if (reason := command.elsewhere)} == set(ELSEWHERE.values())


def client_example() -> str:
    """The example of a client in docs/serving.md."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(example)


@pytest.mark.ranks
def test_every_command_runs_as_it_stands(folder: Path) -> None:
    """Prevents documented commands that fail because of wrong options, missing files or runs that share a folder."""
    failed: list[str] = []
    outputs: dict[str, str] = {}
    launched: set[str] = set()
    server = DocumentServer(folder, shell_environment())
    example: tuple[int, str, str] | None = None
    for command in RUN:
        if command.text in outputs:  # shown twice
            continue
        code, out, err = run(command, folder, launched, server)
        outputs[command.text] = out
        if command.serves and code == 0 and not example:  # the first server needs no key
            (folder / "client.py").write_text(server.asked(client_example()), encoding="utf-8")
            example = run_line("python client.py", folder)
        if code != 0 or "Traceback" in err:
            failed.append(f"{command.where}: {command.text}\nexit code {code}\n{out[-2000:]}\n{err[-3000:]}")
        if "finished at step" in out:
            assert re.search(r"finished at step 2\b", out), (
                f"{command.where}: its run_dir already contains another command's run"
            )
        assert "…" not in out, f"{command.where}: a table is truncated although there is no terminal"
    failed += filter(None, [server.stop()])
    assert not failed, "\n\n".join(failed)
    assert example is not None and example[0] == 0, example
    assert re.search(r"^\d\.\d+ tokens per call of the full model$", example[1], re.MULTILINE), example
    runs = {name: figures(folder / "runs" / name) for name in ("deepspeed", "torchrun", "mpirun", "demo")}
    assert runs["deepspeed"] == runs["torchrun"] == runs["mpirun"], "the ranks of a launcher do not form one group"
    for left, right in zip(runs["deepspeed"], runs["demo"], strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    texts = [
        text
        for command, text in outputs.items()
        if command.startswith("python -m recycle_ds.generate --model runs/demo")
    ]
    assert texts and all(texts), "a continuation is empty"
    names = ("out.jsonl", "runs/answers.jsonl", "runs/answers2.jsonl", "runs/answers3.jsonl")
    answers = {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in names}
    assert all(len(lines) == 2 and all(line["text"] for line in lines) for lines in answers.values()), answers
    short, two_models, two_ranks = ([line["token_ids"] for line in answers[name]] for name in names[1:])
    assert two_models == two_ranks, "two ranks that hold a model together answer otherwise"
    assert [ids[: len(part)] for ids, part in zip(two_models, short, strict=True)] == short


@pytest.mark.ranks
def test_the_python_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents README.md from showing an outdated example of the Python interface."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert "from recycle_ds import Engine, SamplingParams" in code
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().count("tokens were drafts") == 2
