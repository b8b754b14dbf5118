"""Real text and common kinds of tokenizers, for the tests of the data package."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from recycle_ds.data.sources import read_documents
from recycle_ds.data.token_files import TokenFile, TokenFileWriter, open_token_file
from recycle_ds.data.tokenizer import Tokenizer

WriteTokens = Callable[[Path, Sequence[Sequence[int]]], TokenFile]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Paragraphs of the first addresses of the shipped corpus."""
    addresses = itertools.islice(read_documents("shipped"), 12)
    return [paragraph for address in addresses for paragraph in address.split("\n\n")]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of 600 tokens."""
    return Tokenizer.train(texts, 600)


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    """A tokenizer like LLaMA's: spaces as ▁, one prepended, and byte fallback for unknown characters."""
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁t",
    ]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[("▁", "t")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    built = tokenizers.Tokenizer(model)
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(built.to_str())


@pytest.fixture(scope="session")
def write_tokens(tokenizer: Tokenizer) -> WriteTokens:
    """Writes documents given as ids (the end-of-document token is added) and opens the file."""

    def write(prefix: Path, documents: Sequence[Sequence[int]]) -> TokenFile:
        with TokenFileWriter(prefix, tokenizer, "ids") as writer:
            for ids in documents:
                writer.add(ids)
        return open_token_file(prefix, tokenizer)

    return write


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[Sequence[str]], str]:
    """Writes documents as a .jsonl file and returns its path."""

    def write(documents: Sequence[str]) -> str:
        path = tmp_path / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        return str(path)

    return write
