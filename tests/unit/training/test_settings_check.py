"""`recycle_ds.pretrain --check`: settings are checked for the ranks, without data."""

from __future__ import annotations

from pathlib import Path

import pytest

from recycle_ds.config.command import run_command
from recycle_ds.pretrain import app


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--config", "demo"), 0, ""),
        (("--config", "demo", "training.stepz=10"), 2, "training.stepz"),
        (("--config", "dem0"), 2, "--config dem0: no such file"),
        (("--config", "demo", "init_from=nowhere"), 2, "nowhere"),
        (("--config", "demo", "parallel.tensor=2"), 2, "parallel.tensor"),
        (("--config", "demo", "run_dir=file"), 2, "file"),
        (("--config", "demo", "deepspeed=nowhere.json"), 2, "nowhere.json"),
    ],
)
def test_wrong_settings_are_found_without_data(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    """Prevents settings that are found wrong only once the text to train on is written."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    data = ("data.train=[{path: 'it''s not, written} yet'}]", "data.prepare=null")
    with pytest.raises(SystemExit) as ended:
        run_command(app, ["--check", *arguments, *data])
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (code, min(code, 1)) and words in err, err
    assert [path.name for path in Path().iterdir()] == ["file"]
