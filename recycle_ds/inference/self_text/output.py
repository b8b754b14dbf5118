"""The finished text: token files to train and evaluate on, a readable view of them, and a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from recycle_ds.config.atomic_files import publish, temporary_name, write_json_atomically
from recycle_ds.data.token_files import TokenFileWriter, pair_paths
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.batch.parts import remove_parts, remove_unfinished
from recycle_ds.inference.batch.parts_record import PartsRecord
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.self_text.row import EXCLUDED, LOOP
from recycle_ds.inference.self_text.rows import TRAIN, VALIDATION

MANIFEST = "self_text.json"
"""Name of the manifest. It is written last: the other files are complete if it exists."""
_FORMAT = "recycle_ds self-written text"


@dataclass
class SideCounts:
    """Counts of the rows of one side. Shares are of tokens that the model has written."""

    rows: int = 0
    tokens: int = 0
    own: int = 0
    own_repeated: int = 0
    written: int = 0
    written_repeated: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    answers: int = 0
    duplicates: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    temperatures: Counter[str] = field(default_factory=Counter)
    _seen: set[bytes] = field(default_factory=set)

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts a row."""
        self.written += row["written"]
        self.written_repeated += row["written_repeated"]
        if not row["ids"]:
            self.left_out[row["end"]] += 1
            return
        digest = hashlib.blake2b(repr(row["ids"]).encode(), digest_size=12).digest()
        self.duplicates += digest in self._seen
        self._seen.add(digest)
        self.rows += 1
        self.tokens += len(row["ids"]) + 1
        self.own += row["own"]
        self.own_repeated += row["own_repeated"]
        self.cut_rows += row["end"] == LOOP
        self.cut_tokens += row["cut"]
        self.answers += row["answers"]
        self.ends[row["end"]] += 1
        self.kinds[row["kind"]] += 1
        self.temperatures[f"{row['temperature']:g}"] += 1

    def tree(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "tokens_written_by_the_model": self.own,
            "answers": self.answers,
            "rows_by_kind": dict(sorted(self.kinds.items())),
            "rows_by_temperature": dict(sorted(self.temperatures.items())),
            "rows_by_end": dict(sorted(self.ends.items())),
            "rows_left_out": dict(sorted(self.left_out.items())),
            "rows_equal_to_an_earlier_one": self.duplicates,
            "rows_cut": self.cut_rows,
            "share_of_rows_cut": share(self.cut_rows, self.rows),
            "tokens_cut": self.cut_tokens,
            "share_repeating_an_8gram_before_cut": share(self.written_repeated, self.written),
            "share_repeating_an_8gram": share(self.own_repeated, self.own),
        }


def share(part: int, of: int) -> float:
    """A share, rounded; 0 of nothing."""
    return round(part / of, 4) if of else 0.0


@dataclass(frozen=True)
class OutputFolder:
    """The folder that the text is written to."""

    path: Path
    with_text: bool = False

    @property
    def parts(self) -> Path:
        """Folder of the finished groups of rows."""
        return self.path / "parts"

    def check(self, key: str, model_path: str) -> bool:
        """Whether the text is complete. Creates the folder. Raises DecodingError if it cannot be used, or has other files
        of the names that are to be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DecodingError(f"{self.path}: cannot be created ({error.strerror}); name another --output") from None
        if self._is_of(key, model_path):
            return True
        found = [path for path in self._files() if path.exists()]
        if not found or (self.parts.exists() and self.path / MANIFEST not in found):
            return False
        if self._is_of(key, model_path):  # completed in the meantime
            return True
        raise DecodingError(f"{found[0]}: already exists, from another command; name another --output")

    def manifest(self) -> dict[str, Any]:
        """The manifest of a complete text. Raises DecodingError if it cannot be read."""
        path = self.path / MANIFEST
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["format"] == _FORMAT and isinstance(tree["generated_by"], dict):
                return dict(tree)
        except (OSError, ValueError, TypeError, KeyError):
            pass
        raise DecodingError(f"{path}: not a manifest of self-written text; name another --output")

    def write(
        self,
        rows: Mapping[str, Iterable[Mapping[str, Any]]],
        tokens: int,
        tokenizer: Tokenizer,
        source: str,
        recipe: Mapping[str, Any],
        manifest: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Writes everything, the manifest last, and returns it. Leaves rows out after those that have `tokens`.

        rows: by side. Everything is written aside first, then renamed file by file: several processes that do so at once
        replace files by equal ones. Raises DecodingError for a side without rows, before any file appears, FileNotFoundError
        if another process has completed the text and removed the parts, OSError.
        """
        aside = temporary_name(self._unfinished)
        tree = {"format": _FORMAT, "version": 1, **manifest}
        try:
            aside.mkdir()
            for side, records in rows.items():
                counts = self._write_side(
                    aside / side, records, tokens if side == TRAIN else None, tokenizer, source, recipe
                )
                if not counts.rows:
                    reasons = ", ".join(f"{number} {end}" for end, number in sorted(counts.left_out.items()))
                    raise DecodingError(
                        f"{side}: all rows are left out ({reasons or 'there are none'}): lower --min-tokens, use other or more "
                        f"prompts, and name another --output or remove {self.path}"
                    )
                tree[side] = counts.tree()
                excluded = counts.left_out[EXCLUDED]
                tree["exclude"] = {**tree["exclude"], "rows": tree["exclude"]["rows"] + excluded}
            for path in self._files():
                if (
                    path.name != MANIFEST
                    and path.name.split(".")[0] in rows
                    and (self.with_text or path.suffix != ".jsonl")
                ):
                    publish(aside / path.name, path)
            write_json_atomically(self.path / MANIFEST, tree)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return tree

    def _write_side(
        self,
        prefix: Path,
        records: Iterable[Mapping[str, Any]],
        tokens: int | None,
        tokenizer: Tokenizer,
        source: str,
        recipe: Mapping[str, Any],
    ) -> SideCounts:
        """Writes the files of a side, until they have `tokens`."""
        counts = SideCounts()
        view = prefix.with_suffix(".jsonl").open("w", encoding="utf-8") if self.with_text else contextlib.nullcontext()
        with TokenFileWriter(prefix, tokenizer, source, recipe) as writer, view as shown:
            for row in records:
                counts.add(row)
                if row["ids"]:
                    writer.add(row["ids"])
                    _show(shown, row, tokenizer)
                if tokens is not None and counts.tokens >= tokens:
                    break
        return counts

    def tidy(self) -> None:
        """Removes the parts, and what killed processes have left. Only for a complete text."""
        remove_parts(self.parts)
        remove_unfinished(self._unfinished, self.path / MANIFEST, self.parts)

    def _is_of(self, key: str, model_path: str) -> bool:
        """Whether there is a manifest, of this request."""
        if not (self.path / MANIFEST).exists():
            return False
        return PartsRecord(**self.manifest()["generated_by"]).matches(key, model_path)

    @property
    def _unfinished(self) -> Path:
        """The folder that files are written in before they get their names, always with a temporary name."""
        return self.path / "output"

    def _files(self) -> list[Path]:
        sides = [self.path / side for side in (TRAIN, VALIDATION)]
        views = [self.path / f"{side}.jsonl" for side in (TRAIN, VALIDATION)]
        return [self.path / MANIFEST, *(path for side in sides for path in pair_paths(side)), *views]


def _show(view: TextIO | None, row: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    if view is not None:
        text = tokenizer.decode(row["ids"], skip_special_tokens=False)
        shown = {key: row[key] for key in ("row", "kind", "temperature", "end")}
        view.write(json.dumps({**shown, "text": text}, ensure_ascii=False) + "\n")
