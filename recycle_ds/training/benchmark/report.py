"""The training benchmark as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from recycle_ds.config.console import output_console


def print_report(report: dict[str, Any]) -> None:
    """Prints one row per model, then the ratios."""
    table = Table(
        title=f"Training, {report['dtype']}, {report['micro_batch_size']} x {report['seq_length']} tokens per micro-batch, "
        f"{report['world_size']} rank(s) of {report['device']}, {report['threads']} thread(s)"
    )
    for name in ("model", "weights", "tokens/s", "GFLOP/s", "matmul", "state GiB", "peak GiB"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for name, one in report["subjects"].items():
        table.add_row(
            name,
            f"{one['parameters'] / 1e6:.1f}M",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['model_flops_per_second'] / 1e9:,.0f}",
            f"{one['share_of_matmul_rate']:.0%}",
            f"{one['state_gib']:.2f}",
            f"{one['peak_gib']:.2f}",
        )
    ratios = report["ratios"]
    console = output_console()
    console.print(table)
    console.print(
        f"backbone: {ratios['speed_over_huggingface']:.2f}x Hugging Face's tokens/s. Module: {ratios['module_time']:.3f}x the "
        f"time for {ratios['module_flops']:.3f}x the FLOPs ({ratios['module_time_over_flops']:.3f}x)",
        highlight=False,
        soft_wrap=True,
    )
