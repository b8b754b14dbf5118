"""Imports go down the list of rooms only. Read from the source with ast: nothing of the package is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "recycle_ds"
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# A file may import from its own room and from those before it.
ROOMS = (
    "config",
    "data",
    "parallel",
    "model",
    "training",
    "checkpoint",
    "inference",
    "serving",
    "evaluation",
    "planning",
)
# Inside a larger room: a file or folder may import from itself and from those before it.
INSIDE = {
    "training": (
        "errors",
        "schedule",
        "state",
        "batches",
        "engine",
        "faults",
        "reporting",
        "benchmark",
        "saving",
        "loop",
    ),
    "checkpoint": (
        *("errors", "provenance", "size_limits", "sequence_length", "tensor_equality", "files", "sources", "portable"),
        *("huggingface", "megatron", "deepspeed_native", "gguf", "recognition", "loading", "conversion", "run"),
    ),
    "inference": (
        *("errors", "parameters", "protocol", "speculation", "generation", "stream", "decoder", "loading", "console"),
        *("api", "request", "batch", "bench"),
    ),
}
# Entry points that call other entry points; no other file imports one.
CONDUCTORS = ("cli", "demo")
MAX_LINES = 300
MAX_FILES = 18


def violations(source: str, path: str) -> list[str]:
    """What the file at `path` (relative to the package, `model/block.py`) imports and must not, as "line: reason"."""
    folders = path.removesuffix(".py").split("/")
    if len(folders) > 1 and folders[0] not in ROOMS:
        return [f"1: room {folders[0]!r} is not in the list of rooms"]
    found = []
    for line, module, lazy in _imports(ast.parse(source), path):
        if module[:1] != [PACKAGE] or (lazy and folders == ["__init__"]):
            continue
        reason = _fault(folders, module[1:])
        if reason:
            found.append(f"{line}: {reason}")
    return found


def _fault(importer: list[str], imported: list[str]) -> str | None:
    """Why the import is wrong. Both are paths below the package; what is imported may end in a name inside a module."""
    if not imported or imported[0].startswith("__"):  # the package itself, for __version__
        return None
    target, entry_point = imported[0], len(importer) == 1 and importer[0] != "__init__"
    if target not in ROOMS:
        if entry_point and (importer[0] in CONDUCTORS or target == importer[0]):
            return None
        return f"{target} is an entry point (or not in the list of rooms): only {' and '.join(CONDUCTORS)} import those"
    if entry_point:
        return None
    room = importer[0]
    if room == "__init__":
        return f"{PACKAGE}/__init__.py imports {target}: importing the package would pull in all of it"
    if ROOMS.index(target) > ROOMS.index(room):
        return f"{room} imports {target}, which stands above it"
    return _fault_inside(room, importer[1:], imported[1:]) if target == room else None


def _fault_inside(room: str, importer: list[str], imported: list[str]) -> str | None:
    """Why an import between two parts of one room is wrong; rooms that are not in INSIDE have no parts."""
    parts = INSIDE.get(room)
    if parts is None or importer == ["__init__"]:
        return None
    if importer[0] not in parts:
        return f"{importer[0]} is not in the list of {room}'s parts"
    if not imported or imported[0] not in parts:
        return f"{room} as a whole is imported inside it: name the part"
    if parts.index(imported[0]) > parts.index(importer[0]):
        return f"{room}/{importer[0]} imports {room}/{imported[0]}, which stands above it"
    return None


def _imports(tree: ast.Module, path: str) -> Iterator[tuple[int, list[str], bool]]:
    """(line, dotted name as a list, whether it waits for a call or for a type checker) of every import, wherever it stands."""
    package = [PACKAGE, *path.split("/")[:-1]]
    waiting = {id(node) for part in tree.body if _waits(part) for node in ast.walk(part)}
    for node in ast.walk(tree):
        lazy = id(node) in waiting
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split("."), lazy
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, [*base, alias.name], lazy
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value.split("."), lazy


def _waits(node: ast.stmt) -> bool:
    """Whether a top-level statement's imports are not executed when the file is."""
    checks_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef) or checks_types


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _name(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_go_down_only(file: Path) -> None:
    """Prevents cycles between rooms, and a model or loader that cannot be used without the trainer."""
    assert violations(file.read_text(encoding="utf-8"), _name(file)) == []


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_files_stay_readable(file: Path) -> None:
    """Prevents the thousand-line file: one that passes this limit is to be split along a natural seam."""
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{_name(file)} has {lines} lines, the limit is {MAX_LINES}"


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=_name)
def test_folders_stay_readable(folder: Path) -> None:
    """Prevents the folder that nobody can take in at one look."""
    files = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= MAX_FILES, f"{_name(folder)} has {len(files)} files, the limit is {MAX_FILES}"


@pytest.mark.parametrize("room", INSIDE)
def test_the_parts_of_a_room_are_those_listed(room: str) -> None:
    """Prevents a list of parts that has fallen behind the folder it speaks of: what is not listed would not be checked."""
    found = {
        path.stem
        for path in (ROOT / PACKAGE / room).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(INSIDE[room])


def test_the_package_was_found() -> None:
    """Prevents the tests above from passing because they looked at an empty folder."""
    assert len(FILES) > 10


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("model/block.py", "from recycle_ds.training import loop"),
        ("model/block.py", "import recycle_ds.training.loop"),
        ("model/block.py", "from recycle_ds import training"),
        ("model/block.py", "from ..training import loop"),
        ("model/block.py", "from .. import training"),
        ("model/block.py", "def f():\n    import recycle_ds.checkpoint as c"),
        ("model/block.py", "if TYPE_CHECKING:\n    from recycle_ds.serving import server"),
        ("model/block.py", "import importlib\nimportlib.import_module('recycle_ds.inference.engine')"),
        ("config/schema.py", "from recycle_ds.data.errors import DataError"),
        ("training/loop.py", "from recycle_ds.pretrain import main"),
        ("training/loop.py", "from recycle_ds.unheard_of import thing"),
        ("generate.py", "from recycle_ds.pretrain import main"),
        ("helpers/text.py", "import re"),
        ("__init__.py", "from recycle_ds.model import RecycleGPT"),
        ("training/engine/build.py", "from recycle_ds.training.loop import Trainer"),
        ("training/state.py", "from recycle_ds.training.engine.build import build_engine"),
        ("checkpoint/portable/reading.py", "from recycle_ds.checkpoint.run import resume"),
        ("checkpoint/files/new_folder.py", "from recycle_ds.checkpoint import load_model"),
        ("inference/speculation/sampling.py", "from recycle_ds.inference.stream import Stream"),
        ("training/unheard_of.py", "from recycle_ds.training.errors import TrainingError"),
    ],
)
def test_a_wrong_import_is_seen(path: str, line: str) -> None:
    """Prevents a checker that finds nothing because it looks past one way of writing an import."""
    assert len(violations(line, path)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("model/block.py", "from recycle_ds.config import ModelConfig\nfrom recycle_ds.parallel.mesh import Mesh"),
        (
            "model/block.py",
            "from recycle_ds.model.norm import RMSNorm\nfrom . import rope\nfrom ..config import ModelConfig",
        ),
        ("model/block.py", "import torch\nfrom training import loop\nfrom recycle_ds import __version__"),
        ("pretrain.py", "from recycle_ds.training import loop\nfrom recycle_ds.planning import memory"),
        ("demo.py", "from recycle_ds import generate, pretrain"),
        ("cli.py", "import recycle_ds.evaluate"),
        ("__init__.py", "def __getattr__(name):\n    from recycle_ds.inference import api"),
        ("training/loop.py", "from recycle_ds.training.engine.build import TrainingEngine"),
        ("checkpoint/huggingface/reading.py", "from recycle_ds.checkpoint.files.checksums import read_json"),
        ("model/block.py", "from recycle_ds.model import attention"),
    ],
)
def test_a_right_import_is_let_through(path: str, line: str) -> None:
    """Prevents a checker so eager that people learn to work around it."""
    assert violations(line, path) == []
