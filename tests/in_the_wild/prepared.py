"""Documents and chats that are prepared, and the ids that they became."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from recycle_ds.data.prepare import PrepareReport, prepare
from recycle_ds.data.token_files import open_token_file
from recycle_ds.data.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}"
)


def chat_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A byte-level BPE with the tokens of ChatML, whose documents start with <s>."""
    built = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    built.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    config = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "chat_template": CHATML}
    return Tokenizer(built.to_str(), config)


def documents_of(report: PrepareReport, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each training document, without the end-of-document token."""
    file = open_token_file(report.train.prefix, tokenizer)
    tokens, starts = file.read(0, file.tokens)
    ends = [*starts[1:], file.tokens]
    return [tokens[first : last - 1].tolist() for first, last in zip(starts, ends, strict=True)]


def jsonl(path: Path, rows: list[object]) -> str:
    """Writes rows as a .jsonl file and returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(source: str, out: Path, tokenizer: Tokenizer, **options: object) -> PrepareReport:
    """Prepares a source in one process, without validation."""
    return prepare(source, out, tokenizer, validation_fraction=0, workers=1, **options)  # type: ignore[arg-type]
