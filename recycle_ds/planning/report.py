"""Plans as tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace

from rich import box
from rich.console import Console
from rich.table import Table

from recycle_ds.planning.hardware import Cluster
from recycle_ds.planning.memory import GIB
from recycle_ds.planning.plan import Plan, Plans


def print_plans(plans: Plans, cluster: Cluster, console: Console, top: int) -> None:
    """Prints the best layouts, the breakdown of the first, and why others were rejected."""
    gpus = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    fit = f"{len(plans.fitting):,} layouts fit, {len(plans.rejected):,} do not"
    console.print(f"{plans.parameters / 1e9:.2f} B parameters on {gpus}: {fit}")
    if plans.fitting:
        console.print(_best(_shown(plans.fitting)[:top]))
        console.print(_breakdown(plans.fitting[0]))
    console.print(_rejections(plans))


def _shown(plans: list[Plan]) -> list[Plan]:
    """Without layouts that offload although they fit without: those are slower and differ in nothing else."""
    resident = {replace(plan.candidate, offload=True) for plan in plans if not plan.candidate.offload}
    return [plan for plan in plans if plan.candidate not in resident]


def _best(plans: list[Plan]) -> Table:
    # one space between columns, and headings on two lines: 80 columns are enough for every value
    table = Table(
        title="Fastest first (estimates; tensor groups are sequence-parallel)", box=box.SIMPLE_HEAD, padding=0
    )
    columns = [
        "TP",
        "PP",
        "DP",
        "ZeRO",
        "micro",
        "recom-\npute",
        "off-\nload",
        "GiB",
        "step s",
        "tokens/s",
        "MFU",
        "idle",
    ]
    long = any(plan.candidate.layout.ulysses > 1 for plan in plans)
    for name in [*columns[:3], *(["Ulysses"] if long else []), *columns[3:]]:
        table.add_column(name, justify="left" if name in ("recom-\npute", "off-\nload") else "right", no_wrap=True)
    for plan in plans:
        candidate, layout = plan.candidate, plan.candidate.layout
        table.add_row(
            str(layout.tensor),
            str(layout.pipeline),
            str(layout.data),
            *([str(layout.ulysses)] if long else []),
            str(candidate.zero_stage),
            str(candidate.micro_batch_size),
            candidate.recompute,
            "yes" if candidate.offload else "-",
            f"{plan.memory.total / GIB:.1f}",
            f"{plan.time.total:.3g}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.0%}",
            f"{plan.time.bubble:.0%}",
        )
    return table


def _breakdown(plan: Plan) -> Table:
    """Memory, time and traffic of one layout, side by side."""
    table = Table(title=f"The fastest layout, on the rank with most memory in use (stage {plan.stage})")
    for name in ("memory", "GiB", "step time", "s", "sent per rank and step", "GB"):
        table.add_column(name, justify="right" if name in ("GiB", "s", "GB") else "left")
    memory = [(name, f"{value / GIB:.2f}") for name, value in asdict(plan.memory).items() if name != "host"]
    if plan.memory.host:
        memory.append(("(on the host)", f"{plan.memory.host / GIB:.2f}"))
    time = [(name, f"{value:.3f}") for name, value in plan.time.seconds().items()]
    sent = [(name, f"{value / 1e9:.2f}") for name, value in asdict(plan.sent).items()]
    blank = ("", "")
    for row in range(max(len(memory), len(time), len(sent))):
        cells = [column[row] if row < len(column) else blank for column in (memory, time, sent)]
        table.add_row(*[text for cell in cells for text in cell])
    return table


def _rejections(plans: Plans) -> Table:
    """Reasons, and how many layouts each rules out; those for lack of memory are one row with the nearest miss."""
    kinds = Counter(one.reason for one in plans.rejected if not one.reason.startswith("needs "))
    short = sorted(
        (one.reason for one in plans.rejected if one.reason.startswith("needs ")),
        key=lambda text: float(text.split()[1]),
    )
    table = Table(title="Rejected")
    table.add_column("layouts", justify="right")
    table.add_column("reason")
    if short:
        table.add_row(f"{len(short):,}", f"too little memory; the nearest miss {short[0]}")
    for reason, count in kinds.most_common(12):
        table.add_row(f"{count:,}", reason)
    return table
