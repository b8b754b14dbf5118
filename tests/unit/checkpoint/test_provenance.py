"""The commit recorded in the provenance of an artefact."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from recycle_ds.checkpoint import provenance
from recycle_ds.checkpoint.provenance import _revision


def git(folder: Path, *command: str) -> str:
    """Runs git in a folder."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, str]:
    """A checkout with the package at its top level, and another copy installed into its virtual environment."""
    folder = tmp_path / "project"
    for package in (folder / "recycle_ds", folder / ".venv" / "lib" / "site-packages" / "recycle_ds"):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", "recycle_ds")
    git(folder, "commit", "-q", "-m", "first")
    return folder, git(folder, "rev-parse", "HEAD")


def test_the_commit_of_a_checkout(project: tuple[Path, str], tmp_path: Path) -> None:
    """Prevents recording a commit without -dirty although files were changed, and with -dirty for an untracked file."""
    folder, commit = project
    package = folder / "recycle_ds"
    (folder / "notes.txt").write_text("text")
    assert _revision(package) == commit
    (tmp_path / "link").symlink_to(folder)
    assert _revision(tmp_path / "link" / "recycle_ds") == commit
    (package / "__init__.py").write_text("changed = True\n")
    assert _revision(package) == f"{commit}-dirty"
    git(folder, "add", "-u")
    assert _revision(package) == f"{commit}-dirty"


def test_an_installed_package_is_not_part_of_the_project_around_it(project: tuple[Path, str]) -> None:
    """Prevents recording the commit of the project that contains the virtual environment."""
    folder, _ = project
    assert _revision(folder / ".venv" / "lib" / "site-packages" / "recycle_ds") is None


def test_outside_of_any_checkout(project: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a crash without git or a repository, and recording the repository of a git hook that runs a command."""
    folder, commit = project
    (tmp_path / "plain" / "recycle_ds").mkdir(parents=True)
    monkeypatch.setenv("GIT_DIR", str(folder / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "plain"))
    assert _revision(tmp_path / "plain" / "recycle_ds") is None
    assert _revision(folder / "recycle_ds") == commit
    git_init = tmp_path / "empty"
    (git_init / "recycle_ds").mkdir(parents=True)
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_WORK_TREE")
    git(git_init, "init", "-q")
    assert _revision(git_init / "recycle_ds") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _revision(folder / "recycle_ds") is None
    assert provenance.provenance()["git"] is None
