"""The command `recycle-ds plan` (tools/plan.py): a configuration and a cluster in, ranked layouts out."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_ds.checkpoint.run.init_from import init_from_defaults
from recycle_ds.config import RunConfig, load_config
from recycle_ds.config.command import run_command
from recycle_ds.config.console import output_console
from recycle_ds.planning.errors import PlanningError
from recycle_ds.planning.hardware import Cluster, find_gpu

if TYPE_CHECKING:
    from rich.console import Console

    from recycle_ds.planning.plan import Plan, Plans

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
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Layouts in the table.")] = 12,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Build the parts of the best layouts (without memory) and check that they tile."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Rank the layouts of a run on a cluster. Exit code 1 when none fits."""
    cluster = Cluster(nodes, gpus_per_node, find_gpu(gpu, gpu_memory_gib))
    run_config = read_run(config, overrides or [])
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before what warns on import
    sys.exit(run(run_config, cluster, offload=offload, ulysses=ulysses, as_json=as_json, top=top, verify=verify))


def read_run(name: str, overrides: list[str]) -> RunConfig:
    """A run's configuration, see `load_config`, with the vocabulary size of its tokenizer if it gives none.

    Raises PlanningError if there is no tokenizer to take it from, ConfigError for what is wrong in the file.
    """
    config = load_config(name, overrides, init_from_defaults)
    if config.model.vocab_size is not None:
        return config
    from recycle_ds.data.errors import DataError
    from recycle_ds.data.prepare import vocabulary_size

    try:
        return config.with_vocabulary(vocabulary_size(config.data))
    except DataError as error:
        raise PlanningError(f"model.vocab_size is not given, and {error}; or add model.vocab_size=N") from None


def run(
    config: RunConfig, cluster: Cluster, *, offload: bool, as_json: bool, top: int, verify: bool, ulysses: bool = False
) -> int:
    """Prints the plans and returns the exit code, 1 if nothing fits. Raises PlanningError if a verified layout does not
    tile.

        ulysses: whether to consider Ulysses layouts; they are also considered if the run itself has one.
    """
    from recycle_ds.planning.plan import make_plans
    from recycle_ds.planning.report import print_plans

    plans = make_plans(config, cluster, offload=offload, ulysses=ulysses or config.parallel.ulysses > 1)
    console = output_console(stderr=as_json)
    if verify:
        _verify(config, plans, console)
    if as_json:
        print(json.dumps(report(plans)))
    else:
        print_plans(plans, cluster, console, top)
    if not plans.fitting:
        output_console(stderr=True).print(f"error: nothing fits: {nearest(plans)}", highlight=False, soft_wrap=True)
        return 1
    return 0


def report(plans: Plans) -> dict[str, object]:
    """The JSON report: everything that fits, best first, and everything rejected with its reason."""
    return {
        "parameters": plans.parameters,
        "layouts": [plan.report() for plan in plans.fitting],
        "rejected": [rejection.report() for rejection in plans.rejected],
    }


def nearest(plans: Plans) -> str:
    """The reason of the layout that came closest to fitting."""
    short = [one.reason for one in plans.rejected if one.reason.startswith("needs ")]
    if short:
        least = min(short, key=lambda text: float(text.split()[1]))
        return f"the smallest layout {least}; more GPUs, a larger --gpu-memory-gib or a smaller model are needed"
    return plans.rejected[0].reason if plans.rejected else "the cluster has no layout"


def _verify(config: RunConfig, plans: Plans, console: Console) -> None:
    """Builds the parts of every distinct TP x PP of the best layouts."""
    from recycle_ds.planning.verify import verify_layout

    for plan in _distinct(plans.fitting):
        layout = plan.candidate.layout
        built = verify_layout(config, layout, sequence=plan.candidate.sequence)
        console.print(
            f"verified: tensor {layout.tensor} x pipeline {layout.pipeline} x replicas {layout.replicas}: "
            f"{built} parts tile {plans.parameters:,} weights"
        )


def _distinct(plans: list[Plan], most: int = 4) -> list[Plan]:
    """The best plan of each (tensor, pipeline), at most `most` of them."""
    best: dict[tuple[int, int], Plan] = {}
    for plan in plans:
        best.setdefault((plan.candidate.layout.tensor, plan.candidate.layout.pipeline), plan)
    return list(best.values())[:most]


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, by default the process's own arguments."""
    run_command(app, argv)
