"""Continuations of a whole file of prompts, split over processes that share nothing but a folder.

Process r of n takes prompts r, r + n, r + 2n, ... and appends each continuation to a part file of its own, flushed, so that
what is done stays done: a later start, with any number of processes, takes what the parts lack, with the checkpoint that they
were begun with. Whoever finds all prompts done writes the output in their order, under a temporary name that is renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from recycle_ds.config import RecycleError
from recycle_ds.config.atomic_files import temporary_name, write_atomically
from recycle_ds.inference.batch.parts_record import RECORD, Begun, claim, digest_of, read_begun, write_begun
from recycle_ds.inference.errors import DecodingError


class PromptError(DecodingError):
    """A prompt that cannot be continued, by its file and line. Only the process whose prompt it is knows of it."""


class Loaded(Protocol):
    """A model in memory."""

    @property
    def path(self) -> Path:
        """The checkpoint that it is of."""


_L = TypeVar("_L", bound=Loaded)


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with a text under "prompt"; blank lines skipped. Raises DecodingError naming file
    and line."""
    return list(_read_lines(path).values())


def _read_lines(path: Path) -> dict[int, dict[str, Any]]:
    """The objects by the number of their line."""
    try:
        # not splitlines: it also cuts at separators that may stand inside a JSON string
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DecodingError(f"prompts {str(path)!r} cannot be read: {error}") from None
    records = {number: _read_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()}
    if not records:
        raise DecodingError(f'{path}: no prompts; write one JSON object with a "prompt" per line')
    return records


def _read_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if isinstance(prompt, str) and prompt:
            # as the line will be written again
            json.dumps(record, ensure_ascii=False).encode("utf-8")
            return record
    except json.JSONDecodeError as error:
        raise DecodingError(f"{where}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DecodingError(f"{where}: nested too deeply: give the prompt in a flat object") from None
    except UnicodeEncodeError as error:
        raise DecodingError(
            f"{where}: has half a surrogate pair ({error.object[error.start]!r}), which is no character: write it whole, or "
            "without escapes in UTF-8"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise DecodingError(f"{where}: cannot be read: {error}") from None
    raise DecodingError(f'{where}: expected an object with a text under "prompt": {{"prompt": "Once upon"}}')


@dataclass(frozen=True)
class PromptFile:
    """One process's share of a file of prompts: `settle` comes first, then `work`."""

    prompts: Path
    output: Path
    rank: int
    world_size: int
    model: str
    """As asked for; it may be a run, whose newest checkpoint changes."""
    settings: dict[str, Any]
    """What continuations depend on beside prompt and model."""

    @property
    def parts(self) -> Path:
        """Where continuations wait for the others."""
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def _mark(self) -> Path:
        """Beside the output: what it was made of, so that a process that comes late knows that all is done."""
        return self.output.with_name(f".{self.output.name}.key")

    @cached_property
    def _lines(self) -> dict[int, dict[str, Any]]:
        return _read_lines(self.prompts)

    @cached_property
    def _key(self) -> str:
        tree = {"prompts": [record["prompt"] for record in self._lines.values()], "settings": self.settings}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    @property
    def _asked(self) -> str:
        return os.path.abspath(self.model)

    def settle(self, load: Callable[[str], _L]) -> _L | None:
        """Loads the model by its path: the checkpoint that the parts were begun with, at an earlier start or by a quicker
        process; else what --model names now, and begins them. None where all is done.

        Prompts, output and parts are looked at before a model is loaded, which may take long. Raises DecodingError for files
        that cannot be used, and for parts of another file, of other settings, or of a checkpoint that is not there any more.
        """
        self._check_output()
        if self._finished():
            return None
        begun = self._begun()
        loaded = load(begun.checkpoint if begun and begun.portable else self.model)
        mine = self._identity(loaded)
        if begun is None:
            claim(self.parts, mine)
            begun = self._begun()
        if self._finished():  # looked at last: an output is there before its parts go
            return None
        if begun is None:
            raise DecodingError(f"{self.parts}: not a folder of parts; remove it, or name another --output")
        if begun.digest != mine.digest and begun.checkpoint != mine.checkpoint and begun.portable:
            del loaded  # two may be too many
            loaded = load(begun.checkpoint)
            mine = self._identity(loaded)
        if begun.digest != mine.digest:
            raise DecodingError(
                f"{self.parts}: begun with the checkpoint {begun.checkpoint}, {self._advice(begun, mine)}"
            )
        return loaded

    def _identity(self, loaded: Loaded) -> Begun:
        return Begun(self._key, self._asked, os.path.abspath(loaded.path), digest_of(loaded.path))

    def _advice(self, begun: Begun, mine: Begun) -> str:
        if mine.checkpoint == begun.checkpoint:
            return (
                f"whose files have changed since, or are others on this host: bring those back, or remove {self.parts} to "
                "begin anew"
            )
        return f"and {self.model} is {mine.checkpoint} now: go on with --model {begun.checkpoint}, or name another --output"

    def work(
        self,
        generate: Callable[[int, str], dict[str, Any]],
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> bool:
        """Continues what is this process's and not yet done; asked before each prompt whether to `stop`.

        generate: a prompt's number and text to the fields of its line. progress: told how many of this process's prompts are
        done, and how many it had to do. Returns whether all prompts, the other processes' too, are done and the output is
        written; then the parts are gone. Raises PromptError for a prompt that cannot be continued.
        """
        try:
            self._work(generate, stop, progress)
            return self._merge()
        except FileNotFoundError:  # another process has written the output, and tidied up meanwhile
            if self._finished():
                return True
            raise

    def _work(
        self,
        generate: Callable[[int, str], dict[str, Any]],
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> None:
        done, lines = self._done(), list(self._lines.items())
        mine = [index for index in range(self.rank, len(lines), self.world_size) if index not in done]
        part = self.parts / f"part-{self.rank:05d}-of-{self.world_size:05d}.jsonl"
        if not mine:
            return
        _drop_partial_line(part)
        with part.open("a", encoding="utf-8") as file:
            for count, index in enumerate(mine, start=1):
                if stop():
                    break
                number, record = lines[index]
                try:
                    made = generate(index, record["prompt"])
                except RecycleError as error:
                    raise PromptError(f"{self.prompts}:{number}: {error}") from None
                file.write(json.dumps(record | made | {"index": index}, ensure_ascii=False) + "\n")
                file.flush()
                progress(count, len(mine))

    def _check_output(self) -> None:
        """Makes the output's folder. Raises DecodingError for one that cannot be written to, before work is done for it."""
        folder = self.output.parent
        if self.output.is_dir():
            raise DecodingError(f"{self.output}: is a folder; name a file in it as --output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DecodingError(
                f"{self.output}: its folder cannot be made ({error.strerror}); name an --output that you may write"
            ) from None
        for place in (folder, self.parts):
            if place.exists() and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
                raise DecodingError(f"{place}: not a folder that you may write to; name another --output")

    def _finished(self) -> bool:
        """Whether the output is there, by another process or an earlier start. Raises DecodingError for any other file."""
        if not self.output.exists():
            return False
        mark = read_begun(self._mark)
        if mark is None or not mark.serves(self._key, self._asked):
            raise DecodingError(f"{self.output}: already exists; name another --output, or remove it")
        self._remove_parts()  # of a process that was killed before it could, or made by one that came late
        return True

    def _begun(self) -> Begun | None:
        """What the parts were begun with, None where there are none. Raises DecodingError where it is not what is asked for."""
        begun = read_begun(self.parts / RECORD)
        if begun is None:
            return None
        if begun.key != self._key:
            raise DecodingError(
                f"{self.parts}: begun with other prompts or settings; remove it, or name another --output"
            )
        if not begun.serves(self._key, self._asked):
            raise DecodingError(
                f"{self.parts}: begun with the checkpoint {begun.checkpoint}, not with {self.model}: go on with --model "
                f"{begun.checkpoint}, or name another --output"
            )
        if not Path(begun.checkpoint).is_dir():
            raise DecodingError(
                f"{self.parts}: begun with the checkpoint {begun.checkpoint}, which is not there any more: bring it back, or "
                f"remove {self.parts} to begin anew"
            )
        return begun

    def _done(self) -> dict[int, dict[str, Any]]:
        """Lines by prompt, from all parts; a line that a kill cut off is not one."""
        found: dict[int, dict[str, Any]] = {}
        for part in sorted(self.parts.glob("part-*.jsonl")):
            for line in part.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # torn by a crash of the machine
                    continue
                found[record["index"]] = record
        return found

    def _merge(self) -> bool:
        """Writes the output if nothing is lacking any more. Whether it is there."""
        begun, done, count = read_begun(self.parts / RECORD), self._done(), len(self._lines)
        if begun is None or len(done) < count:
            return self._finished()
        write_begun(self._mark, begun)
        lines = [json.dumps(done[index], ensure_ascii=False) + "\n" for index in range(count)]
        write_atomically(self.output, "".join(lines))
        self._remove_parts()
        return True

    def _remove_parts(self) -> None:
        """At once for whoever looks: a folder that is being emptied would be taken for one of parts."""
        aside = temporary_name(self.parts)
        try:
            os.rename(self.parts, aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside, ignore_errors=True)


def _drop_partial_line(part: Path) -> None:
    """What a kill left of a line would become the head of the next one."""
    if part.is_file():
        content = part.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with part.open("r+b") as file:
                file.truncate(len(whole))
