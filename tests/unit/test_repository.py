"""Checks of the repository itself: pinned versions, --help without torch, no paths of one machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import recycle_ds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]

ENTRY_POINTS = [
    name
    for name in ("pretrain", "generate", "serve", "evaluate", "report", "smollm2", "gpu", "cli")
    if (ROOT / f"recycle_ds/{name}.py").exists()
]
TOOLS = sorted((ROOT / "tools").glob("[!_]*.py"))

# The last line on stderr is whether torch was imported.
_ENTRY_HELP = """
import sys
from recycle_ds.{name} import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules, file=sys.stderr)
"""
_TOOL_HELP = """
import runpy, sys
sys.argv = [{path!r}, "--help"]
try:
    runpy.run_path({path!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules, file=sys.stderr)
"""


def _requirements() -> list[Requirement]:
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    return [Requirement(line) for line in lines if line]


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def _python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )


def test_every_requirement_is_pinned() -> None:
    """Prevents a later installation from getting other versions than those that were tested."""
    loose = [str(entry) for entry in _requirements() if [spec.operator for spec in entry.specifier] != ["=="]]
    assert loose == []


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_one_pin_on_every_python(python: str) -> None:
    """Prevents markers that omit a package, or pin it twice, on an untested Python version."""
    names = {canonicalize_name(entry.name) for entry in _requirements()}
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    chosen = [
        canonicalize_name(entry.name)
        for entry in _requirements()
        if entry.marker is None or entry.marker.evaluate(environment)
    ]
    assert sorted(chosen) == sorted(names)


def test_pins_are_within_the_ranges_of_the_package() -> None:
    """Prevents the two lists from diverging: a package in only one of them, or a pin outside its range."""
    project = _project()
    texts = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    ranges = {canonicalize_name(Requirement(text).name): Requirement(text).specifier for text in texts}
    assert set(ranges) == {canonicalize_name(entry.name) for entry in _requirements()}
    for entry in _requirements():
        version = next(iter(entry.specifier)).version
        assert ranges[canonicalize_name(entry.name)].contains(version), f"{entry} is outside pyproject.toml's range"


def test_the_version_is_in_the_changelog() -> None:
    """Prevents a release without an entry in the changelog."""
    assert f"## [{recycle_ds.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert _project()["dynamic"] == ["version"], "the version must be in recycle_ds/__init__.py only"


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_of_an_entry_point_does_not_import_torch(name: str) -> None:
    """Prevents a --help that takes seconds because it imports torch."""
    result = _python(_ENTRY_HELP.format(name=name))
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
    assert result.stderr.splitlines()[-1] == "False", "torch was imported"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_help_of_a_tool_does_not_import_torch(tool: Path) -> None:
    """Prevents a tool whose --help fails, or takes seconds because it imports torch."""
    result = _python(_TOOL_HELP.format(path=str(tool)))
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
    assert result.stderr.splitlines()[-1] == "False", "torch was imported"


@pytest.mark.skipif(not (ROOT / "recycle_ds/pretrain.py").exists(), reason="no entry point to forward to")
def test_the_console_script_forwards_every_argument() -> None:
    """Prevents `recycle-ds` from parsing options, --help included, that belong to the subcommand."""
    code = """
import types, sys
seen = []
sys.modules["recycle_ds.pretrain"] = types.SimpleNamespace(main=lambda argv: seen.append((argv, list(sys.argv))))
from recycle_ds.cli import main
try:
    main(["pretrain", "--config", "a.yaml", "training.steps=3", "--help", "-x"])
except SystemExit as end:
    assert not end.code, end.code
arguments = ["--config", "a.yaml", "training.steps=3", "--help", "-x"]
assert seen == [(arguments, ["recycle-ds pretrain", *arguments])], seen
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr


def test_the_console_script_prints_its_version() -> None:
    """Prevents bug reports without the version."""
    result = _python("from recycle_ds.cli import main; main(['--version'])")
    assert (result.returncode, result.stdout.strip()) == (0, f"recycle-ds {recycle_ds.__version__}")


def test_test_folders_are_packages() -> None:
    """Prevents test files of the same name from shadowing each other, and functions that ranks cannot import."""
    folders = {file.parent for file in (ROOT / "tests").rglob("test_*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_file_contains_a_path_of_one_machine() -> None:
    """Prevents a config, script or document that works on one machine only."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the files of the repository are unknown")
    listing = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\0")
    found = []
    for name in filter(None, names):
        file = ROOT / name
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):  # binary, or deleted but not yet committed
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            found += [f"{name}:{number}: {match.group()}" for match in _machine_path().finditer(line)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("see {}home/someone/project", True),
        ("cd {}root/x && ls", True),
        ('"{}Users/someone"', True),
        ("{}tmp/run-1/file", True),
        ("${{TMPDIR:-{}tmp}}", False),
        ("https://example.org{}home/page", False),
        ("runs{}tmp/x", False),
    ],
)
def test_a_path_of_one_machine_is_detected(text: str, wrong: bool) -> None:
    """Prevents a pattern that matches nothing, or every URL."""
    assert bool(_machine_path().search(text.format("/"))) is wrong


def _machine_path() -> re.Pattern[str]:
    """Matches absolute paths in home and temporary folders, and the path of this checkout."""
    own = re.escape(str(ROOT)) + r"(?!\w)"
    return re.compile(rf"(?<![\w.}}~-])(?:/(?:home|root|Users|tmp|var/tmp)/[\w.]+|{own})")


def test_no_placeholder_is_left_in_the_documents() -> None:
    """Prevents placeholders in the documents that were not replaced by figures."""
    for file in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        assert re.findall(r"\b(?:DEMO|TODO|XXX|TBD)(?:_[A-Z]+)?\b", file.read_text(encoding="utf-8")) == [], file
