"""Names in a run folder: checkpoints/step-00000004, `latest`, and .tmp-* for what is unfinished."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.portable.manifest import MANIFEST
from recycle_ds.config.atomic_files import TEMPORARY

REPLACED = "replaced-"
"""Name prefix of a checkpoint while another one of the same step takes its place."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# Where users keep models and runs: no owners of repositories.
_LOCAL = ("runs", "models", "data", "checkpoints")
_STEP = re.compile(r"^step-(\d{8,})$")
# What a folder of any supported format has at least one of.
_OF_A_MODEL = re.compile(
    r"(manifest|config|metadata)\.json|config\.yaml|checkpoints|latest.*|(iter_|mp_rank_|global_step|step-|release).*"
    r"|.*\.(safetensors|pt|pth|bin|ckpt|distcp|nemo|gguf)"
)
_MOST_NAMED = 3


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, None for any other name."""
    match = _STEP.match(folder.name)
    return int(match.group(1)) if match else None


def completed(run_dir: Path) -> list[Path]:
    """Published checkpoints of a run (those renamed into place), newest first."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def remove_unfinished(run_dir: Path) -> None:
    """Deletes unfinished files of a killed run, and restores a checkpoint that it renamed but did not replace."""
    root = run_dir / "checkpoints"
    for replaced in root.glob(f"{REPLACED}*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for path in (*root.glob(f"{TEMPORARY}*"), *run_dir.glob(f"{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_folder(path: str | Path) -> None:
    """Raises CheckpointError unless a path is a folder. Does not import torch, so that a mistyped path is reported at
    once."""
    if Path(path).is_dir():
        return
    if Path(path).exists():
        raise CheckpointError(f"{path}: is a file; name its folder")
    raise CheckpointError(f"{path}: no such folder{_advice(str(path))}")


def check_model_folder(path: str | Path) -> None:
    """`check_folder`, and raises CheckpointError for a folder in which nothing is of a model. Does not import torch."""
    check_folder(path)
    if _may_be_a_model(Path(path)):
        return
    inside = sorted(one for one in Path(path).iterdir() if one.is_dir() and _may_be_a_model(one))
    named = ", ".join(str(one) for one in inside[:_MOST_NAMED])
    more = f" and {len(inside) - _MOST_NAMED} more" if len(inside) > _MOST_NAMED else ""
    raise CheckpointError(f"{no_checkpoint(path)}{named and f'; name a folder inside it: {named}{more}'}")


def _may_be_a_model(folder: Path) -> bool:
    try:
        return any(_OF_A_MODEL.fullmatch(name) for name in os.listdir(folder))
    except OSError:  # the reason is shown when it is read
        return True


def no_checkpoint(path: str | Path) -> str:
    """What to say of a folder without a checkpoint."""
    return f"{path}: no checkpoint there (looked for {MANIFEST}, checkpoints/step-* and config.json)"


def _advice(path: str) -> str:
    """How to get a folder that does not exist; empty unless its name tells."""
    parts = Path(path).parts
    if parts and parts[-1] == "smollm2":
        return f"; `python tools/fetch_smollm2.py {path}` makes it"
    if not _HUB_ID.match(path) or parts[0] in _LOCAL or Path(parts[0]).is_dir():
        return ""
    return (
        "; if this is a Hugging Face repository: models are read from local folders only, so download it first "
        f"(`hf download {path} --local-dir models/{parts[-1]}`, needs a network) and name that folder"
    )


def check_run_dir(run_dir: str) -> None:
    """Raises CheckpointError if a run folder cannot be created or written to. Creates nothing, and does not import
    torch."""
    nearest = Path(run_dir).absolute()
    while True:
        try:
            folder = stat.S_ISDIR(nearest.stat().st_mode)
            break
        except (FileNotFoundError, NotADirectoryError):
            nearest = nearest.parent
        except OSError:  # a file server that does not answer may do so when the folder is made
            return
    if not folder:
        raise _unusable(run_dir, f"{nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unusable(run_dir, f"no permission to write to {nearest}")


def make_run_dir(run_dir: str) -> Path:
    """Creates a run folder if it does not exist. Raises CheckpointError."""
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(run_dir, error.strerror or str(error)) from error
    return path


def _unusable(run_dir: str, reason: str) -> CheckpointError:
    return CheckpointError(f"run_dir={run_dir!r}: cannot be created ({reason}); name a folder that you may write to")


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint at a path: itself, or the newest of a run folder or checkpoints folder. Raises CheckpointError."""
    check_folder(path)
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return folder
    run_dir = run_folder(folder)
    found = completed(run_dir)
    if found:
        return found[0]
    if (run_dir / "config.yaml").is_file():
        raise CheckpointError(f"{path}: this run has not saved a checkpoint yet; continue it, or name another folder")
    raise CheckpointError(no_checkpoint(path))


def run_folder(folder: Path) -> Path:
    """The run folder of a path that may be its folder of checkpoints."""
    return folder.parent if folder.name == "checkpoints" else folder
