"""Recycle modules that ship with the package, and attaching a module to the Hugging Face folder of its model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import describe, read_json, verify_all
from recycle_ds.checkpoint.files.safetensors_reader import ShardFiles
from recycle_ds.checkpoint.huggingface.module import MODULE_CONFIG, MODULE_WEIGHTS, read_module
from recycle_ds.checkpoint.huggingface.names import RECYCLE
from recycle_ds.checkpoint.huggingface.reading import INDEX, SINGLE, HuggingFaceSource
from recycle_ds.checkpoint.sources import shorten
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.config.atomic_files import publish, publish_together, temporary_name, write_json_atomically
from recycle_ds.data.token_ranking import RANKING, read_ranking
from recycle_ds.model.build import whole_shapes

SMOLLM2 = Path(__file__).resolve().parents[2] / "modules" / "smollm2_135m_instruct"
"""The module for SmolLM2-135M-Instruct. A shipped module has the files of a module in a Hugging Face folder, and a card."""


def check_shipped(module: Path) -> None:
    """Raises CheckpointError if this copy of the package does not have the files of a shipped module."""
    missing = [name for name in (MODULE_WEIGHTS, MODULE_CONFIG) if not (module / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{module}: {' and '.join(missing)} missing: this copy of the package has no such module; install a release, or "
            "train one (docs/retrofit.md)"
        )


def attach(folder: Path, module: Path) -> None:
    """Adds a module to a Hugging Face folder that has none. Its files are copied unchanged, in their own dtype.

    module: a folder with recycle.json, its weight files and, for a draft vocabulary, token_ranking.json. recycle.json is
    written last: after an interruption, the same call completes the folder. Raises CheckpointError if the folder has a
    module, or if the module is damaged or does not fit the model, DataError for a ranking that does not. Nothing is
    changed then.
    """
    recycle, files = read_module(module)
    if not recycle.layers:
        raise CheckpointError(f"{module}: no {MODULE_CONFIG}: not the folder of a recycle module")
    verify_all(module, files)
    for name in (RANKING, *files, MODULE_CONFIG):
        if (folder / name).is_dir():
            raise CheckpointError(f"{folder / name}: is a folder where the module has a file; move it away")
    _remove_remains(folder, module)
    source = HuggingFaceSource(folder, verify=False)
    if source.recycle.layers:
        raise CheckpointError(f"{folder}: already has a recycle module; remove its {MODULE_CONFIG} and weights first")
    _check_fits(folder, source.model, module, recycle, list(files))
    names = [*files, MODULE_CONFIG]
    if recycle.draft_vocabulary is not None:
        assert source.model.vocab_size is not None, "a source knows its vocabulary"
        read_ranking(module / RANKING, source.model.vocab_size, recycle.draft_vocabulary)
        names.insert(0, RANKING)
    _write_index(folder)
    pairs = [(temporary_name(folder / name), folder / name) for name in names]
    with _kept(folder / RANKING):
        _copy(module, pairs)


def _copy(module: Path, pairs: list[tuple[Path, Path]]) -> None:
    try:
        for temporary, path in pairs:
            shutil.copyfile(module / path.name, temporary)
        publish_together(pairs)
    finally:
        for temporary, _ in pairs:
            temporary.unlink(missing_ok=True)


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Restores a file of the model, if it has one, after an error in the block."""
    if not path.is_file():
        yield
        return
    before = temporary_name(path)
    try:
        shutil.copyfile(path, before)
        try:
            yield
        except BaseException:  # Ctrl-C too
            publish(before, path)
            raise
    finally:
        before.unlink(missing_ok=True)


def has_module(folder: Path) -> bool:
    """Whether a Hugging Face folder has a complete module: its recycle.json is written last."""
    return (folder / MODULE_CONFIG).is_file()


def is_same_module(folder: Path, module: Path) -> bool:
    """Whether a folder has just this module. Raises CheckpointError for an unreadable recycle.json."""
    settings = [
        {key: read_json(one / MODULE_CONFIG).get(key) for key in ("recycle", "file", "files")}
        for one in (folder, module)
    ]
    return settings[0] == settings[1]


def _remove_remains(folder: Path, module: Path) -> None:
    """Removes weights that an interrupted `attach` left without a recycle.json, which no other command accepts."""
    remains, shipped = folder / MODULE_WEIGHTS, module / MODULE_WEIGHTS
    if not has_module(folder) and remains.is_file() and shipped.is_file() and describe(remains) == describe(shipped):
        remains.unlink()


def _check_fits(folder: Path, model: ModelConfig, module: Path, recycle: RecycleConfig, files: list[str]) -> None:
    """Raises CheckpointError unless the module's tensors are those that its settings need beside this model."""
    beyond = [tap for tap in recycle.taps if tap >= model.layers]
    if beyond:
        raise CheckpointError(f"{module}: taps block {beyond[0]}, and {folder} has {model.layers}: not its module")
    expected = {name: tuple(shape) for name, shape in whole_shapes(model, recycle).items() if name.startswith(RECYCLE)}
    weights = ShardFiles(module)
    found = {key: weights.shape(file, key) for file in files for key in weights.keys(file)}
    wrong = [
        f"{name} {list(found.get(name, ())) or 'missing'} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    wrong += [f"{name} is not expected" for name in found if name not in expected]
    if wrong:
        raise CheckpointError(
            f"{module}: does not fit {folder} (hidden {model.hidden}, {model.heads} heads): {shorten(wrong)}; attach it to "
            "the model that it was trained for"
        )


def _write_index(folder: Path) -> None:
    """Lists the model's own tensors: without an index, vLLM and SGLang read every safetensors file of a folder."""
    if (folder / INDEX).exists():
        return
    weights = ShardFiles(folder)
    table = dict.fromkeys(weights.keys(SINGLE), SINGLE)
    write_json_atomically(
        folder / INDEX, {"metadata": {"total_size": (folder / SINGLE).stat().st_size}, "weight_map": table}
    )
