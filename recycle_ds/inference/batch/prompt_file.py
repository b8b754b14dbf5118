"""Continues all prompts of a file, split over processes that share only a folder.

Process r of n takes prompts r, r + n, r + 2n, ... and appends each continuation to its own part file, flushed line by
line, so that completed prompts survive a kill. A later start, with any number of processes, continues the missing
prompts with the checkpoint that the parts were created with. A prompt that cannot be continued completes with an error.
The process that finds all prompts completed writes the output atomically, and before it the list of failed prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from recycle_ds.config import RecycleError
from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.inference.batch.claims import Claim, Loaded
from recycle_ds.inference.batch.failures import (
    ERROR,
    GENERATED_BY,
    check_list,
    check_name,
    failures_of,
    failures_path,
    has_failed,
    list_failures,
    output_line,
    own_keys,
    part_line,
    remove_list,
)
from recycle_ds.inference.batch.parts import (
    completed_lines,
    drop_partial_line,
    part_of,
    remove_parts,
    remove_unfinished,
)
from recycle_ds.inference.batch.parts_record import RECORD, PartsRecord, read_record
from recycle_ds.inference.batch.prompts import read_lines
from recycle_ds.inference.errors import DecodingError

_L = TypeVar("_L", bound=Loaded)


@dataclass(frozen=True)
class PromptFile:
    """One process's share of a file of prompts. Call `settle` first, then `work`."""

    prompts: Path
    output: Path
    rank: int
    world_size: int
    model: str
    """Path of --model. It may be a run folder, whose newest checkpoint changes."""
    settings: dict[str, Any]
    """Everything that determines a continuation, apart from prompt and model."""

    @property
    def parts(self) -> Path:
        """Folder of the partial outputs of all processes."""
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def failures_path(self) -> Path:
        """The list of prompts that could not be continued, written with the output."""
        return failures_path(self.output)

    @cached_property
    def _lines(self) -> dict[int, dict[str, Any]]:
        return read_lines(self.prompts)

    @cached_property
    def _key(self) -> str:
        tree = {"prompts": [record["prompt"] for record in self._lines.values()], "settings": self.settings}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    @property
    def _claim(self) -> Claim:
        return Claim(self.parts, self._key, self.model)

    def settle(self, load: Callable[[str], _L]) -> _L | None:
        """Loads the model and claims the parts folder, see `Claim.settle`. Returns None if the output is already complete.

        Prompts, output and parts are checked before the model is loaded, which may take long. Raises DecodingError for
        files that cannot be used, and for parts created with other prompts, other settings or a checkpoint that no
        longer exists.
        """
        self._check_output()
        if self._is_complete():
            return None
        # the list may be that of an output that has been removed
        return self._claim.settle(load, self._is_complete, lambda: remove_list(self.failures_path))

    def work(
        self,
        generate: Callable[[Iterator[tuple[int, str]]], Iterator[tuple[int, dict[str, Any] | RecycleError]]],
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> bool:
        """Continues this process's missing prompts, until `stop`, which is called before each prompt, returns True.

        generate: maps prompts (index and text), read as needed, to the fields of their output lines or to errors, in
        any order. progress: called with the number of this process's completed prompts, those of earlier starts among
        them, and their total. Returns whether
        all prompts, including those of other processes, are completed; the output is then written and the parts are
        removed. A prompt that cannot be continued is completed by its error.
        """
        try:
            self._continue_missing(generate, stop, progress)
            return self._merge()
        except FileNotFoundError:  # another process has written the output and removed the parts
            if self._is_complete():
                return True
            raise

    def _continue_missing(
        self,
        generate: Callable[[Iterator[tuple[int, str]]], Iterator[tuple[int, dict[str, Any] | RecycleError]]],
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> None:
        completed, records = completed_lines(self.parts), list(self._lines.values())
        share = range(self.rank, len(records), self.world_size)
        missing = [index for index in share if index not in completed]
        if not missing:
            return

        def wanted() -> Iterator[tuple[int, str]]:
            for index in missing:
                if text := records[index]["prompt"]:
                    if stop():
                        return
                    yield index, text

        empty = [index for index in missing if not records[index]["prompt"]]
        refused = ((index, DecodingError("the prompt is empty: give at least one character")) for index in empty)
        part = part_of(self.parts, self.rank, self.world_size)
        drop_partial_line(part)
        with part.open("a", encoding="utf-8") as file:
            for count, (index, answer) in enumerate(chain(refused, generate(wanted())), 1):
                file.write(json.dumps(part_line(index, answer), ensure_ascii=False) + "\n")
                file.flush()
                progress(len(share) - len(missing) + count, len(share))

    def failures(self) -> int:
        """Number of prompts of the finished output that could not be continued. Writes the list of them if it is missing
        or stale."""
        errors = failures_of(self.output)
        list_failures(self.failures_path, self._lines, errors)
        return len(errors)

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self._lines)

    def _check_output(self) -> None:
        """Creates the output's folder. Raises DecodingError if it is not writable, before any prompt is decoded."""
        folder = self.output.parent
        check_name(self.output)
        if self.output.is_dir():
            raise DecodingError(f"{self.output}: is a folder; name a file in it as --output")
        if self.output.exists() and not self.output.is_file():
            raise DecodingError(f"{self.output}: is a pipe or a device; name a file as --output")
        if self.output.exists() and self.prompts.exists() and self.output.samefile(self.prompts):
            raise DecodingError(f"{self.output}: is the file of prompts; name another --output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DecodingError(
                f"{self.output}: its folder cannot be created ({error.strerror}); name a writable --output"
            ) from None
        for path in (folder, self.parts):
            if path.exists() and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
                raise DecodingError(f"{path}: not a writable folder; name another --output")
        check_list(self.failures_path, self.prompts)

    def _is_complete(self) -> bool:
        """Whether another process or an earlier start has written the output. Raises DecodingError for an unrelated file, and
        for one that has been damaged since."""
        if not self.output.exists():
            return False
        record = self._record_of_output()
        if record is None or not record.matches(self._key, self._claim.model_path):
            raise DecodingError(f"{self.output}: already exists; name another --output, or remove it")
        lines = _complete_lines(self.output)
        if lines != self.count:
            raise DecodingError(
                f"{self.output}: has {lines} complete lines of {self.count}: damaged since it was written; restore it, or "
                "remove it to start over"
            )
        if not self._has_current_keys():
            raise DecodingError(
                f"{self.output}: was written when {self.prompts} had other keys beside the prompts; name another --output, or "
                "remove it"
            )
        self._tidy()
        return True

    def _has_current_keys(self) -> bool:
        """Whether the lines of a finished output have the keys that the records have now beside the prompts."""
        with self.output.open(encoding="utf-8", newline="\n") as file:
            lines = (_parsed(line) for line in file)
            pairs = zip(self._lines.values(), lines, strict=True)
            return all(own_keys(record) == own_keys(line) for record, line in pairs)

    def _record_of_output(self) -> PartsRecord | None:
        """The record in the first line of a finished output: a process that starts late recognises the output by it."""
        try:
            with self.output.open(encoding="utf-8") as file:
                return PartsRecord(**json.loads(file.readline())[GENERATED_BY])
        except OSError as error:
            raise DecodingError(f"{self.output}: cannot be read ({error.strerror or error})") from None
        except (ValueError, TypeError, KeyError):  # another kind of file
            return None

    def _merge(self) -> bool:
        """Writes the output if all prompts are completed. Returns whether the output exists."""
        record, completed, count = read_record(self.parts / RECORD), completed_lines(self.parts), self.count
        if record is None or len(completed) < count:
            return self._is_complete()
        by = {GENERATED_BY: asdict(record)}
        current = (output_line(one, completed[index]) for index, one in enumerate(self._lines.values()))
        lines = [json.dumps(line | by, ensure_ascii=False) + "\n" for line in current]
        errors = {index: line[ERROR] for index, line in completed.items() if has_failed(line)}
        list_failures(self.failures_path, self._lines, errors)  # first: the output vouches for it
        write_atomically(self.output, "".join(lines))
        self._tidy()
        return True

    def _tidy(self) -> None:
        """Removes the parts, and what processes that were killed or that started late have left."""
        remove_parts(self.parts)
        remove_unfinished(self.output, self.failures_path, self.parts)


def _complete_lines(path: Path) -> int:
    """Lines of a file that end."""
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(2**20), b""))


def _parsed(line: str) -> dict[str, Any]:
    """A line's object; an empty one for what is none."""
    try:
        tree = json.loads(line)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}
