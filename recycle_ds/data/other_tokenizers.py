"""Tokenizers in formats other than tokenizer.json: how to make one of them."""

from __future__ import annotations

from pathlib import Path

_FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "SentencePiece": (("tokenizer.model",), "transformers sentencepiece protobuf"),
    "BPE": (("vocab.json", "merges.txt"), "transformers"),
    "Tekken": (("tekken.json",), "transformers mistral-common"),
    "tiktoken": (("qwen.tiktoken",), "transformers tiktoken"),
}
"""Files of each format, and the packages that read it."""

OTHER_FILES = ("added_tokens.json", *(name for names, _ in _FORMATS.values() for name in names))


def advice(folder: Path) -> str | None:
    """How to make a tokenizer.json of the tokenizer in a folder; None if there is none in a known format."""
    for kind, (names, packages) in _FORMATS.items():
        if all((folder / name).is_file() for name in names):
            return (
                f"{folder} has a {kind} tokenizer ({', '.join(names)}) and no tokenizer.json: make one of it with transformers "
                f"(pip install {packages}): "
                f'python -c "from transformers import AutoTokenizer as T; T.from_pretrained({str(folder)!r}).save_pretrained('
                f'{str(folder)!r})"'
            )
    return None
