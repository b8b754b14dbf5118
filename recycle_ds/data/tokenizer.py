"""Tokenizers of the `tokenizers` library: loading, training, fingerprints, encoding, decoding."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from recycle_ds.config.atomic_files import publish_together, temporary_name
from recycle_ds.data.errors import DataError, encoding_errors, one_line
from recycle_ds.data.interruptible import call_interruptibly
from recycle_ds.data.other_tokenizers import advice
from recycle_ds.data.special_ids import TOKEN_MAP, SpecialIds, read_special_ids, read_tree, token_named
from recycle_ds.data.special_text import TextEncoder, pattern_of, special_tokens

END_OF_TEXT = "<|endoftext|>"
"""End-of-document token of the tokenizers trained here."""
_KNOWN_EOS = (END_OF_TEXT, "</s>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|eos|>", "[EOS]")
_KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[BOS]")
_BYTES = 256
_MOST_TOKENS = 4_000_000


class Tokenizer:
    """A Hugging Face fast tokenizer: vocabulary, merges, and the ids that start and end a document."""

    def __init__(
        self,
        tokenizer_json: str,
        config: dict[str, Any] | None = None,
        *,
        name: str = "tokenizer",
        special: SpecialIds | None = None,
    ) -> None:
        """Build from the content of a tokenizer.json and, if there is one, of the tokenizer_config.json beside it.

        Args:
            tokenizer_json: the file's text. It is kept, and `save` writes it back unchanged.
            config: names the end and start tokens (`eos_token`, `bos_token`); other keys are kept unchanged.
            name: name of this tokenizer in error messages.
            special: named in other files of its model; further end tokens, and the first of them if no token is named.

        Raises:
            DataError: it is not a tokenizer, or has no end-of-document token.
        """
        try:
            content = json.loads(tokenizer_json)
            tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises plain Exception for everything it cannot read
            raise DataError(f"{name} is not a valid tokenizer.json: {one_line(error)}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.name = name
        self._json, self._config, self._tokenizer = tokenizer_json, dict(config or {}), tokenizer
        self.token_ids = frozenset(tokenizer.get_vocab(with_added_tokens=True).values())
        """Ids that have a token, added tokens included."""
        self.vocab_size = max(self.token_ids, default=-1) + 1
        """Ids range from 0 to this minus one. Not all of them need have a token."""
        self.special_ids = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        """Ids of special tokens (end of text, chat roles), which are not text."""
        self.added_tokens = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        """Tokens beside those of the vocabulary's model, and their ids; not all of them are special."""
        self._named = special = special or SpecialIds()
        eos_id = self._special("eos_token", _KNOWN_EOS, special.eos)
        if eos_id is None:
            raise DataError(
                f"{name} has no end-of-document token: name it as eos_token in a tokenizer_config.json beside it, "
                f"or add one of {', '.join(_KNOWN_EOS)}"
            )
        if token_named(self._config, "eos_token") is None:  # one built from `to_json` and `config` must have the same
            self._config["eos_token"] = tokenizer.id_to_token(eos_id)
        self.eos_id: int = eos_id
        """Token that ends a document."""
        also = (*special.eos, self._id_of(special.eos_token or ""))
        self.end_ids = frozenset({eos_id, *(one for one in also if one in self.token_ids)})
        """Tokens that end a text in decoding."""
        self.bos_id = self._special("bos_token", _KNOWN_BOS, () if special.bos is None else (special.bos,))
        """Token that starts a document, or None."""
        self.special_tokens = special_tokens(tokenizer, self._config, (*sorted(self.end_ids), self.bos_id))
        """Tokens, and their ids, that stand for something else than their text: those of `special_ids`, all that the
        configuration names, and those that start and end a document or a text. A text may contain their characters."""
        self.special_pattern = pattern_of(self.special_tokens)
        """Matches each of them in a text, as group 1."""
        # Truncation and padding change no id, so the fingerprint ignores them.
        identity = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self.fingerprint = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
        """SHA-256, in hex, of the tokenizer's canonical JSON."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder, and what the files beside it say about its special tokens.

        These are tokenizer_config.json, special_tokens_map.json, config.json and generation_config.json, if they exist.

        Raises:
            DataError: there is no such file, or it cannot be read.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            other = advice(file.parent)
            raise DataError(
                other or f"no such tokenizer: {file}; make one with `recycle-ds tokenizer`, or give its path"
            )
        folder = file.parent
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the tokenizer {file}: {one_line(error)}") from error
        config, mapped = read_tree(folder / "tokenizer_config.json"), read_tree(folder / TOKEN_MAP)
        named = {key: mapped[key] for key in ("eos_token", "bos_token") if token_named(mapped, key) is not None}
        return cls(text, {**named, **config}, name=str(file), special=read_special_ids(folder))

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[str, dict[str, Any]]]:
        return functools.partial(Tokenizer, name=self.name, special=self._named), (self._json, self._config)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE with `<|endoftext|>`; the same texts always give the same tokenizer.

        Args:
            texts: documents, read once.
            vocab_size: number of tokens, from 257 (all bytes and the end of text) to 4 million.

        Raises:
            DataError: `vocab_size` is too small or too large, or larger than the text allows.
        """
        smallest = _BYTES + 1
        if vocab_size < smallest:
            raise DataError(f"a byte-level vocabulary needs at least {smallest} tokens, not {vocab_size}; increase it")
        if vocab_size > _MOST_TOKENS:  # memory for all of them is taken at once
            raise DataError(f"a vocabulary has at most {_MOST_TOKENS:,} tokens, not {vocab_size:,}; lower it")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        call_interruptibly(lambda: tokenizer.train_from_iterator(texts, trainer))
        if tokenizer.get_vocab_size() < vocab_size:
            raise DataError(
                f"the text yields a vocabulary of {tokenizer.get_vocab_size()} tokens, not {vocab_size}; "
                "reduce the vocabulary size, or give more text"
            )
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": None}
        return cls(tokenizer.to_str(pretty=True), config, name="the trained tokenizer")

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of a text. No special token is added. See `encode_batch`."""
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """Ids of several texts, in order, computed with the library's threads.

        Args:
            texts: without special tokens at start and end, which are not added.
            parse_special: whether special tokens that are written in a text stand for themselves, as in a raw prompt. False for
                documents and for what users write: such tokens are then text, and no special token is in the result.

        Raises:
            DataError: a text cannot be encoded (the vocabulary has neither bytes nor an unknown token).
        """
        with encoding_errors(self.name):
            if not parse_special:
                return self._text_encoder.encode_batch(texts)
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_parts(self, parts: Sequence[str], also: Iterable[str] = ()) -> list[int]:
        """Ids of a text, a special token, a text and so on, as of one text in which only these tokens are special.

        Args:
            parts: the text, divided.
            also: added tokens that are text in these texts although they are not marked as special.

        Raises:
            DataError: as `encode_batch`.
        """
        with encoding_errors(self.name):
            more = frozenset((*parts[1::2], *also)).difference(self.special_tokens)
            if more not in self._encoders:
                tokens = self.special_tokens | {token: self.added_tokens[token] for token in sorted(more)}
                self._encoders[more] = TextEncoder(self._json, tokens, self.name)
            return self._encoders[more].encode_parts(parts)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def to_json(self) -> str:
        """Content of the tokenizer.json, from which another process can build this tokenizer."""
        return self._json

    @property
    def config(self) -> dict[str, Any]:
        """A copy of the tokenizer_config.json."""
        return dict(self._config)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (unchanged, so the fingerprint stays the same) and tokenizer_config.json, both or neither.

        Raises:
            DataError: they cannot be written.
        """
        target = Path(folder)
        config = {"eos_token": self._tokenizer.id_to_token(self.eos_id), **self._config}
        contents = {
            target / "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            target / "tokenizer.json": self._json,
        }
        temporary = {path: temporary_name(path) for path in contents}
        try:
            target.mkdir(parents=True, exist_ok=True)
            for path, text in contents.items():
                temporary[path].write_text(text, encoding="utf-8")
            publish_together([(file, path) for path, file in temporary.items()])
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"cannot write to {target}: {reason}; free space there, or name another folder") from error
        finally:
            for file in temporary.values():
                with contextlib.suppress(OSError):  # no folder, or a broken disk
                    file.unlink(missing_ok=True)

    @functools.cached_property
    def _text_encoder(self) -> TextEncoder:
        return TextEncoder(self._json, self.special_tokens, self.name)

    @functools.cached_property
    def _encoders(self) -> dict[frozenset[str], TextEncoder]:
        """By the tokens that are special in a chat in addition to `special_tokens`."""
        return {frozenset(): self._text_encoder}

    def _id_of(self, token: str) -> int | None:
        try:
            found: int | None = self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can contain and no vocabulary can
            return None
        return found

    def _special(self, key: str, known: Sequence[str], ids: Sequence[int]) -> int | None:
        """Id of the token named in the configuration, else the first of `ids`, else of the first well-known one; None if there
        is none of these."""
        token = token_named(self._config, key)
        if token is not None:
            found = self._id_of(token)
            if found is None:
                shown = repr(token[:60])
                raise DataError(f"{self.name}: its tokenizer_config.json names {key} {shown}, not in the vocabulary")
            return found
        if key in self._config and key == "bos_token":
            return None  # explicitly configured: documents have no start token
        named = (one for one in ids if one in self.token_ids)
        well_known = (self._id_of(token) for token in known)
        return next((one for one in (*named, *well_known) if one is not None), None)
