"""Entry point of `make demo`: pretrains a small RecycleGPT, decodes held-out prompts in three modes. On the machine's GPUs, or
with two ranks on its CPU.

Leaves runs/demo/{metrics.jsonl, decoding.json, prompts.jsonl, loss.png, decoding.png, checkpoints/}. A second call
skips pretraining that is complete."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config import RecycleError, RunConfig, load_config
from recycle_ds.config.command import INTERRUPTED, run_command, shown_command

CONFIG = "ds_configs/runs/demo.yaml"
CPU_RANKS = 2
_SAVE_TIMEOUT = 60.0
"""Seconds that ranks have to save after a signal."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 12, 24, 96


@dataclass(frozen=True)
class Ranks:
    """The ranks that pretrain: one for each GPU that is used, or some on the CPU."""

    number: int
    on_gpus: bool


def choose_ranks(gpus: int, config: RunConfig) -> Ranks:
    """As many of the visible `gpus` as divide the global batch evenly; two ranks on the CPU if there are none, or fewer than
    one replica of the model needs."""
    parallel, training = config.parallel, config.training
    replica = parallel.tensor * parallel.pipeline * parallel.ulysses
    micro_batches = training.global_batch_size // training.micro_batch_size
    for replicas in range(gpus // replica, 0, -1):
        if micro_batches % replicas == 0:
            return Ranks(replicas * replica, on_gpus=True)
    return Ranks(CPU_RANKS, on_gpus=False)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the demo's.")
    ] = None,
) -> None:
    """Pretrain on the shipped corpus, decode in three modes, print a table and draw two plots."""
    start = time.monotonic()
    config = load_config(CONFIG, overrides or ())
    run_dir = Path(config.run_dir)
    if finished(config):
        print(f"pretraining: already complete ({run_dir}/checkpoints); `make demo-clean` removes it", flush=True)
    else:
        pretrain(config, overrides or [])
    trained = time.monotonic()
    decode(config, run_dir)
    total = time.monotonic() - start
    print(
        f"\npretraining {trained - start:.0f} s, decoding {total - (trained - start):.0f} s, together {total / 60:.1f} min"
    )
    print(f"in {run_dir}/: metrics.jsonl  prompts.jsonl  decoding.json  loss.png  decoding.png  checkpoints/")
    options = ["--model", str(run_dir), "--prompt", "The Congress", "--mode", "verified"]
    print(f"try: {shown_command('recycle_ds.generate', *options)}")


def finished(config: RunConfig) -> bool:
    """Whether a run with this configuration has already reached its last step."""
    run_dir = Path(config.run_dir)
    latest, saved = run_dir / "checkpoints" / "latest", run_dir / "config.yaml"
    if not (latest.is_file() and saved.is_file() and latest.read_text().strip() == f"step-{config.training.steps:08d}"):
        return False
    before = load_config(saved)
    model = before.model.model_copy(update={"vocab_size": config.model.vocab_size})
    return (model, before.recycle, before.training) == (config.model, config.recycle, config.training)


def pretrain(config: RunConfig, overrides: list[str]) -> None:
    """Starts the ranks of `choose_ranks`. Raises RecycleError if they fail."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = choose_ranks(gpus, config)
    names = [torch.cuda.get_device_name(index) for index in range(ranks.number)] if ranks.on_gpus else []
    print(f"pretraining on {described_devices(names, ranks.number)}", flush=True)
    shown, command = launch_command(ranks, overrides)
    print(f"$ {shown}", flush=True)
    code = _run_group(command, rank_environment(ranks, dict(os.environ), _cores()))
    if code != 0:
        raise RecycleError(f"pretraining ended with exit code {code}; its output is above")


def described_devices(gpus: list[str], ranks: int) -> str:
    """What the ranks run on, by the names of the GPUs; without any, on the CPU."""
    if not gpus:
        return f"the CPU with {ranks} ranks"
    return f"one GPU ({gpus[0]})" if len(gpus) == 1 else f"{len(gpus)} GPUs ({', '.join(dict.fromkeys(gpus))})"


def launch_command(ranks: Ranks, overrides: list[str]) -> tuple[str, list[str]]:
    """The command that starts the ranks, as a user would type it and as it is run.

    On GPUs not by DeepSpeed's launcher, which ignores CUDA_VISIBLE_DEVICES when it is given a number of ranks.
    """
    arguments = ["recycle_ds.pretrain", "--config", CONFIG, *overrides]
    if ranks.on_gpus and ranks.number == 1:
        return " ".join(["python", "-m", *arguments]), [sys.executable, "-m", *arguments]
    number, port = str(ranks.number), str(_free_port())
    if ranks.on_gpus:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", number, "--master-port", port]
        return " ".join(["torchrun", "--nproc-per-node", number, "-m", *arguments]), [
            *(sys.executable, *launcher, "-m", *arguments)
        ]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", number, "--log_level", "error", "--master_port", port]
    return " ".join(["deepspeed", "--num_gpus", number, "--module", *arguments]), [
        *(sys.executable, *launcher, "--module", *arguments)
    ]


def rank_environment(ranks: Ranks, environment: dict[str, str], cores: int) -> dict[str, str]:
    """The environment of the ranks: they use the GPUs, or none, and an equal share of the cores."""
    found = environment | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(max(1, cores // ranks.number))}
    if not ranks.on_gpus:  # without DS_ACCELERATOR DeepSpeed warns that it found none
        found |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or CPU_RANKS


def _run_group(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command in its own process group, forwards SIGINT and SIGTERM to the group and waits until it has saved."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
        deadline = time.monotonic() + _SAVE_TIMEOUT
        while received and _group_lives(process.pid) and time.monotonic() < deadline:  # the launcher may exit first
            time.sleep(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
    return code


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def decode(config: RunConfig, run_dir: Path) -> None:
    """Decodes held-out prompts in the three modes, prints the table, draws the plots."""
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before what warns on import
    from recycle_ds.inference.bench.comparison import BenchSettings, bench_model, write_report
    from recycle_ds.inference.bench.plots import plot_decoding
    from recycle_ds.inference.bench.setting import described
    from recycle_ds.inference.bench.tables import print_result
    from recycle_ds.training.reporting.plots import plot_loss

    prompts = run_dir / "prompts.jsonl"
    write_prompts(config, prompts)
    settings = BenchSettings(max_new_tokens=NEW_TOKENS)
    result = bench_model(str(run_dir), prompts, settings, dtype="fp32", threads=1)
    write_report(result.report, run_dir / "decoding.json")
    plot_decoding(result.report, run_dir / "decoding.png")
    plot_loss(run_dir / "metrics.jsonl", run_dir / "loss.png")
    print(f"\n{PROMPTS} held-out prompts, {NEW_TOKENS} tokens each, greedy, {described(result.report)}")
    print_result(result)


def write_prompts(config: RunConfig, path: Path) -> None:
    """Takes prompts from the validation documents, evenly spaced, each starting at the beginning of a word."""
    from recycle_ds.data.token_files import open_token_file
    from recycle_ds.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.data.tokenizer)
    tokens = open_token_file(config.data.validation[0].path, tokenizer)
    with path.open("w", encoding="utf-8") as file:
        for number in range(PROMPTS):
            start = (tokens.tokens - 2 * PROMPT_TOKENS) * number // PROMPTS
            ids, _ = tokens.read(start, 2 * PROMPT_TOKENS)
            kept = [token for token in ids.tolist() if token != tokenizer.eos_id]
            text = tokenizer.decode(kept[: 2 * PROMPT_TOKENS])
            words = text.split()[1:]
            while len(tokenizer.encode(" ".join(words))) > PROMPT_TOKENS:
                words.pop()
            file.write(json.dumps({"prompt": " ".join(words)}) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, or the process's own arguments."""
    try:
        run_command(app, argv)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("interrupted; the next `make demo` continues from the newest checkpoint", file=sys.stderr, flush=True)
        raise


if __name__ == "__main__":
    main()
