"""Continuations of a whole file of prompts, split over processes that share nothing but a folder.

Process r of n takes prompts r, r + n, r + 2n, ... and appends each continuation to a part file of its own, flushed, so that
what is done stays done: a later start, with any number of processes, takes what the parts lack. Whoever finds all prompts done
writes the output, in the prompts' order, under a temporary name that is renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_ds.data.atomic import write_atomically
from recycle_ds.inference.errors import DecodingError


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with a text under "prompt"; blank lines skipped. Raises DecodingError naming file
    and line."""
    records = []
    try:
        # not splitlines: it also cuts at separators that may stand inside a JSON string
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DecodingError(f"prompts {str(path)!r} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DecodingError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise DecodingError(
                f'{path}:{number}: expected an object with a text under "prompt": {{"prompt": "Once upon"}}'
            )
        records.append(record)
    if not records:
        raise DecodingError(f'{path}: no prompts; write one JSON object with a "prompt" per line')
    return records


@dataclass(frozen=True)
class PromptFile:
    """One process's share of a file of prompts. settings: what continuations depend on beside the prompt."""

    prompts: Path
    output: Path
    rank: int
    world_size: int
    settings: dict[str, Any]

    @property
    def parts(self) -> Path:
        """Where continuations wait for the others."""
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def _mark(self) -> Path:
        """Beside the output: what it was made of, so that a process that comes late knows that all is done."""
        return self.output.with_name(f".{self.output.name}.key")

    def work(
        self,
        generate: Callable[[int, str], dict[str, Any]],
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> bool:
        """Continues what is this process's and not yet done; asked before each prompt whether to `stop`.

        generate: a prompt's number and text to the fields of its line. progress: told how many of this process's prompts are
        done, and how many it had to do. Returns whether all prompts, the other processes' too, are done and the output is
        written; then the parts are gone. Raises DecodingError for a file that cannot be used, and where the parts are another
        file's or other settings'.
        """
        records = read_prompt_file(self.prompts)
        key = self._key(records)
        if self.output.is_file() and not self.parts.is_dir():
            if self._mark.is_file() and self._mark.read_text(encoding="utf-8") == key:
                return True  # another process was quicker, or an earlier start of the job
            raise DecodingError(f"{self.output}: already exists; name another --output, or remove it")
        self._claim(key)
        done = self._done()
        mine = [index for index in range(len(records)) if index % self.world_size == self.rank and index not in done]
        part = self.parts / f"part-{self.rank:05d}-of-{self.world_size:05d}.jsonl"
        if mine:
            _drop_partial_line(part)
            with part.open("a", encoding="utf-8") as file:
                for count, index in enumerate(mine, start=1):
                    if stop():
                        break
                    line = records[index] | generate(index, records[index]["prompt"]) | {"index": index}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    progress(count, len(mine))
        return self._merge(len(records))

    def _key(self, records: list[dict[str, Any]]) -> str:
        tree = {"prompts": [record["prompt"] for record in records], "settings": self.settings}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def _claim(self, key: str) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        held = self.parts / "key"
        if not held.is_file():
            write_atomically(held, key)
        if held.read_text(encoding="utf-8") != key:
            raise DecodingError(
                f"{self.parts}: begun with other prompts or settings; remove it, or name another --output"
            )

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

    def _merge(self, count: int) -> bool:
        """Writes the output if nothing is lacking any more. Whether the output is there."""
        try:
            done = self._done()
            if len(done) < count:
                return False
            write_atomically(self._mark, (self.parts / "key").read_text(encoding="utf-8"))
        except FileNotFoundError:  # another process has written it, and tidied up meanwhile
            return self.output.is_file()
        lines = [json.dumps(done[index], ensure_ascii=False) + "\n" for index in range(count)]
        write_atomically(self.output, "".join(lines))
        shutil.rmtree(self.parts, ignore_errors=True)
        return True


def _drop_partial_line(part: Path) -> None:
    """What a kill left of a line would become the head of the next one."""
    if part.is_file():
        content = part.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with part.open("r+b") as file:
                file.truncate(len(whole))
