"""The finished text: sides without rows, processes that complete it at once or start late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.data.token_files import open_token_file
from recycle_ds.inference.batch.claims import Claim
from recycle_ds.inference.batch.parts_record import PartsRecord
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.self_text.command import _print
from recycle_ds.inference.self_text.output import OutputFolder
from tests.unit.inference.self_text.test_writing import tokenizer

ROW: dict[str, Any] = {
    "row": 0, "kind": "x", "temperature": 0.0, "end": "turns", "answers": 1, "written": 3, "written_repeated": 0, "own": 3,
    "own_repeated": 0, "cut": 0, "ids": [1, 2, 3],
}  # fmt: skip
LEFT_OUT = ROW | {"ids": [], "end": "too short"}


def write(folder: OutputFolder, train: Any, validation: Any, model: str = "m") -> dict[str, Any]:
    """Writes both sides."""
    record = PartsRecord("k", model, model, "d")
    manifest = {"exclude": {"rows": 0}, "generated_by": asdict(record)}
    return folder.write({"train": train, "validation": validation}, 4, tokenizer(), "s", {}, manifest)


@pytest.mark.parametrize("sides", [([ROW], [LEFT_OUT]), ([LEFT_OUT], [ROW]), ([ROW], [])])
def test_a_side_without_rows_is_an_error(tmp_path: Path, sides: tuple[Any, Any]) -> None:
    """Prevents empty token files, which no run can read, and half an output."""
    with pytest.raises(
        DecodingError, match=r"all rows are left out \((1 too short|there are none)\): lower --min-tokens"
    ):
        write(OutputFolder(tmp_path, with_text=True), *sides)
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_overtaken_leaves_a_complete_output(tmp_path: Path) -> None:
    """Prevents files that are removed or damaged by a second process that writes the same output."""
    folder = OutputFolder(tmp_path, with_text=True)
    folder.parts.mkdir()

    def overtaken() -> Iterator[dict[str, Any]]:
        yield ROW | {"ids": [1]}
        write(folder, [ROW], [ROW, LEFT_OUT])
        folder.tidy()
        yield ROW

    with pytest.raises(FileNotFoundError):
        write(folder, overtaken(), [ROW, LEFT_OUT])
    names = [f"{side}{suffix}" for side in ("train", "validation") for suffix in (".bin", ".idx", ".json", ".jsonl")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "self_text.json"])
    assert open_token_file(tmp_path / "train", tokenizer()).tokens == 4
    assert json.loads((tmp_path / "self_text.json").read_text())["validation"]["rows_left_out"] == {"too short": 1}
    write(folder, [ROW], [ROW, LEFT_OUT])  # one that read all rows before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "self_text.json"])


def test_held_out_rows_that_are_missing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents an evaluation on fewer rows than were asked for, without a word."""
    manifest = write(OutputFolder(tmp_path), [ROW], [ROW, LEFT_OUT])
    manifest |= {"model": "m", "exclude": {"texts": 0}, "settings": {"held_out": 2, "tokens": 4}}
    _print(manifest, tmp_path)
    assert "warning: only 1 of 2 held-out rows remain; left out: 1 too short\n" in capsys.readouterr().out


class Overtaken(OutputFolder):
    """Another process completes the output when this one has looked for its files."""

    @property
    def parts(self) -> Path:
        """Folder of the parts, which are removed."""
        if not (self.path / "self_text.json").exists():
            write(OutputFolder(self.path), [ROW], [ROW], str(self.path))
        return self.path / "parts"


def test_an_output_that_is_completed_meanwhile_is_no_stranger(tmp_path: Path) -> None:
    """Prevents "already exists, from another command" for the job's own output."""
    folder = Overtaken(tmp_path)
    (tmp_path / "train.bin").write_text("")  # the other process has published this much
    assert folder.check("k", str(tmp_path))
    with pytest.raises(DecodingError, match="already exists"):
        folder.check("other", str(tmp_path))


def test_a_late_process_does_not_create_the_parts_again(tmp_path: Path) -> None:
    """Prevents an empty parts folder beside a complete output, created by a process that loaded the model for longer than
    the others needed for the job."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    complete = False

    class Loaded:
        path = tmp_path / "model"

    def load(path: str) -> Loaded:
        nonlocal complete
        complete = True
        return Loaded()

    claim = Claim(tmp_path / "out" / "parts", "k", str(tmp_path / "model"))
    claim.parts.parent.mkdir()
    assert claim.settle(load, lambda: complete, lambda: None) is None
    assert not list(claim.parts.parent.iterdir())
