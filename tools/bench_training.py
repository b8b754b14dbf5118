"""Compares training speed: this model with and without its recycle module, and Hugging Face's of the same shape."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench_training(
    config: Annotated[str, typer.Option(help="Run configuration (YAML), or the name of one in ds_configs/runs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Timed steps of each model, in turns.")] = 10,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=0, help="Stop early after this time, but not before three steps.")
    ] = 180,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; by default PyTorch's choice.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Print where the time of a step goes instead.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Train three models in turns under the same DeepSpeed settings. Also under deepspeed, torchrun and mpirun.

    The configuration must have model.vocab_size; its data are not read. A global batch too small for the ranks is raised to one
    micro-batch per rank.
    """
    import torch

    from recycle_ds.parallel import rendezvous

    rendezvous.quiet_libraries()
    from recycle_ds.planning.command import read_run

    if threads is not None:
        torch.set_num_threads(threads)
    run = read_run(config, overrides or [])
    launch = rendezvous.detect_launch(os.environ)
    rendezvous.start(launch)  # sets the device before DeepSpeed is imported, which would detect one with a warning
    from recycle_ds.config.atomic_files import write_json_atomically
    from recycle_ds.parallel.mesh import build_mesh
    from recycle_ds.training.benchmark.comparison import profile_subjects, raise_batch, run_benchmark
    from recycle_ds.training.benchmark.report import print_report

    try:
        mesh = build_mesh(run.parallel, rendezvous.own_device(launch))
        run = raise_batch(run, mesh.data.size)
        if profile:
            for name, table in profile_subjects(run, mesh).items():
                if mesh.is_first:
                    print(f"{name}\n{table}")
            return
        report = run_benchmark(run, mesh, rounds=steps, seconds_at_most=seconds)
        if mesh.is_first:
            print_report(report)
            if json_path is not None:
                json_path.parent.mkdir(parents=True, exist_ok=True)
                write_json_atomically(json_path, report)
    finally:
        rendezvous.stop()


if __name__ == "__main__":
    run_command(app, None)
