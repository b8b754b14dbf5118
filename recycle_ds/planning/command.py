"""What `tools/plan.py` does: a configuration and a cluster in, plans out."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from recycle_ds.config import RunConfig, load_config
from recycle_ds.planning.errors import PlanningError
from recycle_ds.planning.hardware import Cluster
from recycle_ds.planning.plan import Plan, Plans, make_plans
from recycle_ds.planning.report import print_plans
from recycle_ds.planning.verify import verify_layout

PRESETS = Path("ds_configs/runs")


def read_run(name: str, overrides: list[str]) -> RunConfig:
    """A run's YAML by its path, or a shipped one by its name; the vocabulary taken from the tokenizer where it is not given.

    Raises PlanningError when there is neither, ConfigError for what is wrong in it.
    """
    path = Path(name)
    if not path.is_file() and (PRESETS / f"{name}.yaml").is_file():
        path = PRESETS / f"{name}.yaml"
    config = load_config(str(path), overrides)
    if config.model.vocab_size is not None:
        return config
    from recycle_ds.data.errors import DataError
    from recycle_ds.data.tokenizer import Tokenizer

    try:
        size = Tokenizer.load(config.data.tokenizer).vocab_size
    except DataError as error:
        raise PlanningError(f"model.vocab_size is not given, and {error}: add model.vocab_size=N") from None
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def run(
    config: RunConfig, cluster: Cluster, *, offload: bool, as_json: bool, top: int, verify: bool, ulysses: bool = False
) -> int:
    """Prints the plans; exit code 1 when nothing fits. Raises PlanningError when a verified layout does not tile.

    Ulysses layouts are among them where they are asked for, or where the run has one.
    """
    plans = make_plans(config, cluster, offload=offload, ulysses=ulysses or config.parallel.ulysses > 1)
    console = Console(stderr=as_json)
    if verify:
        _verify(config, plans, console)
    if as_json:
        print(json.dumps(report(plans)))
    else:
        print_plans(plans, cluster, console, top)
    if not plans.fitting:
        Console(stderr=True).print(f"error: nothing fits: {nearest(plans)}", highlight=False, soft_wrap=True)
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
