"""Which layouts of a run fit a cluster: memory, traffic, bubble, step time and MFU of each, ranked."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from recycle_ds.config.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plan(
    config: Annotated[str, typer.Option(help="Run configuration (YAML), or the name of one in ds_configs/runs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", help="Nodes of the cluster.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(metavar="N", help="GPUs of a node.")] = 8,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="a100-40, a100-80, l40s, h100, h200, b200, mi300x.")
    ] = "h100",
    gpu_memory_gib: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of a GPU, where it is not the usual one.")
    ] = None,
    offload: Annotated[bool, typer.Option(help="Consider optimizer state in host memory.")] = True,
    ulysses: Annotated[bool, typer.Option("--ulysses", help="Consider Ulysses too, for long sequences.")] = False,
    top: Annotated[int, typer.Option(metavar="N", help="Layouts in the table.")] = 12,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Build the parts of the best layouts (without memory) and check that they tile."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Rank the layouts of a run on a cluster. Exit code 1 when none fits."""
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before what warns on import
    from recycle_ds.planning.command import read_run, run
    from recycle_ds.planning.hardware import Cluster, find_gpu

    cluster = Cluster(nodes, gpus_per_node, find_gpu(gpu, gpu_memory_gib))
    run_config = read_run(config, overrides or [])
    sys.exit(run(run_config, cluster, offload=offload, ulysses=ulysses, as_json=as_json, top=top, verify=verify))


if __name__ == "__main__":
    run_command(app, None)
