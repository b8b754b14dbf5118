"""Entry point of `make demo`: pretrains a small RecycleGPT with two ranks, decodes held-out prompts in three modes.

Leaves runs/demo/{metrics.jsonl, decoding.json, prompts.jsonl, loss.png, decoding.png, checkpoints/}. A second call skips what
is done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config import RecycleError, RunConfig, load_config
from recycle_ds.config.command import run_command

CONFIG = "ds_configs/runs/demo.yaml"
RANKS = 2
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 12, 24, 96

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the demo's.")
    ] = None,
) -> None:
    """Pretrain on the shipped corpus, decode in three modes, print a table and draw two plots."""
    begun = time.monotonic()
    config = load_config(CONFIG, overrides or ())
    run_dir = Path(config.run_dir)
    if finished(config):
        print(f"pretraining: done before ({run_dir}/checkpoints); `make demo-clean` forgets it", flush=True)
    else:
        pretrain(overrides or [])
    trained = time.monotonic()
    decode(config, run_dir)
    total = time.monotonic() - begun
    print(
        f"\npretraining {trained - begun:.0f} s, decoding {total - (trained - begun):.0f} s, together {total / 60:.1f} min"
    )
    print(f"in {run_dir}/: metrics.jsonl  decoding.json  loss.png  decoding.png  checkpoints/")
    print(f'try: .venv/bin/python -m recycle_ds.generate --model {run_dir} --prompt "The Congress" --mode verified')


def finished(config: RunConfig) -> bool:
    """Whether the run's last checkpoint is that of its last step."""
    latest = Path(config.run_dir) / "checkpoints" / "latest"
    return latest.is_file() and latest.read_text().strip() == f"step-{config.training.steps:08d}"


def pretrain(overrides: list[str]) -> None:
    """Starts the ranks with the deepspeed launcher, each with its share of the cores. Raises RecycleError if they fail."""
    import torch

    threads = max(1, len(os.sched_getaffinity(0)) // RANKS) if hasattr(os, "sched_getaffinity") else 1
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # found out by itself, DeepSpeed warns about it
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(RANKS), "--log_level", "error"]
    command = [*launcher, "--module", "recycle_ds.pretrain", "--config", CONFIG, *overrides]
    print(
        f"$ deepspeed --num_gpus {RANKS} --module recycle_ds.pretrain --config {CONFIG} {' '.join(overrides)}",
        flush=True,
    )
    code = subprocess.run(command, env=environment, check=False).returncode
    if code != 0:
        raise RecycleError(f"pretraining ended with exit code {code}; what it printed is above")


def decode(config: RunConfig, run_dir: Path) -> None:
    """Decodes held-out prompts in the three modes, prints the table, draws the plots."""
    from recycle_ds.inference.bench import BenchSettings, bench_model, print_result, write_report
    from recycle_ds.inference.plots import plot_decoding
    from recycle_ds.training.plots import plot_loss

    prompts = run_dir / "prompts.jsonl"
    write_prompts(config, prompts)
    settings = BenchSettings(max_new_tokens=NEW_TOKENS)
    result = bench_model(str(run_dir), prompts, settings, dtype="fp32", threads=1)
    write_report(result.report, run_dir / "decoding.json")
    plot_decoding(result.report, run_dir / "decoding.png")
    plot_loss(run_dir / "metrics.jsonl", run_dir / "loss.png")
    print(f"\n{PROMPTS} held-out prompts, {NEW_TOKENS} tokens each, greedy, fp32, one thread")
    print_result(result)


def write_prompts(config: RunConfig, path: Path) -> None:
    """Cuts prompts out of the validation documents, at even distances, each from the beginning of a word."""
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
    run_command(app, argv)


if __name__ == "__main__":
    main()
