"""Entry point of `make gpu`: checks and measures on one CUDA GPU what CPUs cannot prove. docs/gpu.md says what and how.

Leaves runs/gpu/{report.md, report.json} and what the parts wrote in runs/gpu/parts/. Exit codes: 0 all parts passed, 1 some did
not, 2 no GPU, or a wrong option.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from recycle_ds.config import ConfigError
from recycle_ds.config.command import run_command

MODEL = Path("models/smollm2")
_PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "transformers")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def gpu(
    device: Annotated[
        Literal["cuda", "cpu"],
        typer.Option(help="cpu: a rehearsal in small, which shows that every part runs and measures nothing of a GPU."),
    ] = "cuda",
    minutes: Annotated[
        float, typer.Option(metavar="M", help="All parts end by then; the report is always written.")
    ] = 8,
    only: Annotated[
        str, typer.Option(metavar="LIST", help="Parts to run, comma-separated; by default all. See --list.")
    ] = "",
    listed: Annotated[bool, typer.Option("--list", help="Print the names of the parts and exit.")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help=f"SmolLM2-135M with a recycle module; by default {MODEL} if it is there, else random weights.",
        ),
    ] = None,
    run_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report.")] = Path("runs/gpu"),
    jobs: Annotated[int | None, typer.Option(metavar="N", help="Tests side by side; by default by cores.")] = None,
) -> None:
    """Run tests/gpu and the benches on one GPU, and say which claims of the documents they bear out."""
    from recycle_ds.gpu_check.parts import CheckSettings, all_parts, default_jobs

    repository = Path(__file__).resolve().parents[1]
    settings = CheckSettings(
        run_dir=run_dir,
        device=device,
        minutes=minutes,
        only=tuple(name for name in only.replace(" ", "").split(",") if name),
        model=_model(model, rehearsal=device == "cpu"),
        jobs=default_jobs() if jobs is None else jobs,
    )
    parts = all_parts(settings, repository)
    if listed:
        print("\n".join(part.name for part in parts))
        return
    machine = _machine(device)
    from recycle_ds.gpu_check.check import run_check

    print(f"checking on {machine['name']}, at most {minutes:g} minutes; report: {run_dir}/report.md", flush=True)
    passed = run_check(settings, repository, machine, parts=parts)
    print((run_dir / "report.md").read_text(encoding="utf-8").partition("\n## Parts")[0], flush=True)
    print(f"in {run_dir}/: report.md  report.json")
    sys.exit(0 if passed else 1)


def _model(model: Path | None, *, rehearsal: bool) -> Path | None:
    """The folder to decode. Raises ConfigError for one that is not there or has no module."""
    if model is None:
        return MODEL if not rehearsal and (MODEL / "recycle.json").is_file() else None
    if not (model / "recycle.json").is_file():
        raise ConfigError(
            f"--model {model}: not the folder of a model with a recycle module (no recycle.json): make one with "
            "tools/fetch_smollm2.py DIR --with-module, or omit --model for random weights"
        )
    return model


def _machine(device: str) -> dict[str, object]:
    """Name, memory and versions. Raises ConfigError without a CUDA GPU, unless this is a rehearsal."""
    import torch

    from recycle_ds.parallel.device import local_device, machine_name

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("make gpu needs a CUDA GPU, and PyTorch finds none; --device cpu rehearses it on a CPU")
    found: dict[str, object] = {"name": machine_name(local_device() if device == "cuda" else torch.device("cpu"))}
    if device == "cuda":
        found["GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["CUDA"] = torch.version.cuda
    found["python"] = sys.version.split()[0]
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv`, or the process's own arguments."""
    run_command(app, argv)


if __name__ == "__main__":
    main()
