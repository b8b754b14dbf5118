"""Files import only from lower layers of the package. The imports are read from the source with ast, not executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "recycle_ds"
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# A file may import from its own subpackage and from those before it.
SUBPACKAGES = (
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
    "gpu_check",
)
# In a larger subpackage, a file or folder may import from itself and from those before it.
PARTS = {
    "training": (
        "errors",
        "run_context",
        "schedule",
        "state",
        "batches",
        "prefetching",
        "observers",
        "engine",
        "faults",
        "reporting",
        "benchmark",
        "saving",
        "recovery",
        "launched",
        "loop",
    ),
    "checkpoint": (
        *("errors", "provenance", "size_limits", "sequence_length", "tensor_equality", "files", "sources", "portable"),
        *("huggingface", "megatron", "deepspeed_native", "gguf", "recognition", "loading", "tokenizer_check"),
        *("conversion", "run"),
    ),
    "inference": (
        *(
            "errors",
            "parameters",
            "protocol",
            "text_stream",
            "speculation",
            "generation",
            "native",
            "engine",
            "decoder",
        ),
        *("ranks", "loading", "console", "answers", "api", "request", "batch", "self_text", "bench"),
    ),
}
# Entry points that may import other entry points; no other file may.
CALLERS = ("cli", "demo")
MAX_LINES = 300
MAX_FILES = 18


def violations(source: str, path: str) -> list[str]:
    """The forbidden imports of the file at `path` (relative to the package: `model/block.py`), as "line: reason"."""
    folders = path.removesuffix(".py").split("/")
    if len(folders) > 1 and folders[0] not in SUBPACKAGES:
        return [f"1: {folders[0]!r} is not in the list of subpackages"]
    found = []
    for line, module, lazy in _imports(ast.parse(source), path):
        if module[:1] != [PACKAGE] or (lazy and folders == ["__init__"]):
            continue
        reason = _fault(folders, module[1:])
        if reason:
            found.append(f"{line}: {reason}")
    return found


def _fault(importer: list[str], imported: list[str]) -> str | None:
    """Why the import is wrong. Both are paths below the package. The imported one may end in a name inside a module."""
    if not imported or imported[0].startswith("__"):  # the package itself, for __version__
        return None
    target, entry_point = imported[0], len(importer) == 1 and importer[0] != "__init__"
    if target not in SUBPACKAGES:
        if entry_point and (importer[0] in CALLERS or target == importer[0]):
            return None
        return f"{target} is an entry point (or not in the list of subpackages): only {' and '.join(CALLERS)} import it"
    if entry_point:
        return None
    subpackage = importer[0]
    if subpackage == "__init__":
        return f"{PACKAGE}/__init__.py imports {target}: importing the package would import all of it"
    if SUBPACKAGES.index(target) > SUBPACKAGES.index(subpackage):
        return f"{subpackage} imports {target}, which is above it"
    return _fault_inside(subpackage, importer[1:], imported[1:]) if target == subpackage else None


def _fault_inside(subpackage: str, importer: list[str], imported: list[str]) -> str | None:
    """Why an import between two parts of one subpackage is wrong. Subpackages that are not in PARTS have no parts."""
    parts = PARTS.get(subpackage)
    if parts is None or importer == ["__init__"]:
        return None
    if importer[0] not in parts:
        return f"{importer[0]} is not in the list of {subpackage}'s parts"
    if not imported or imported[0] not in parts:
        return f"{subpackage} is imported as a whole by one of its parts: name the part"
    if parts.index(imported[0]) > parts.index(importer[0]):
        return f"{subpackage}/{importer[0]} imports {subpackage}/{imported[0]}, which is above it"
    return None


def _imports(tree: ast.Module, path: str) -> Iterator[tuple[int, list[str], bool]]:
    """All imports: line, dotted name as a list, whether only a call executes it or only a type checker reads it."""
    package = [PACKAGE, *path.split("/")[:-1]]
    deferred = {id(node) for part in tree.body if _is_deferred(part) for node in ast.walk(part)}
    for node in ast.walk(tree):
        lazy = id(node) in deferred
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


def _is_deferred(node: ast.stmt) -> bool:
    """Whether a top-level statement's imports are not executed when the file is."""
    checks_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef) or checks_types


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _name(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_go_down_only(file: Path) -> None:
    """Prevents cycles between subpackages, and a model or loader that cannot be used without the trainer."""
    assert violations(file.read_text(encoding="utf-8"), _name(file)) == []


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_files_stay_readable(file: Path) -> None:
    """Prevents files of a thousand lines. A file beyond the limit must be split."""
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{_name(file)} has {lines} lines, the limit is {MAX_LINES}"


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=_name)
def test_folders_stay_readable(folder: Path) -> None:
    """Prevents folders with so many files that a reader loses the overview."""
    files = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= MAX_FILES, f"{_name(folder)} has {len(files)} files, the limit is {MAX_FILES}"


@pytest.mark.parametrize("subpackage", PARTS)
def test_the_parts_of_a_subpackage_are_those_listed(subpackage: str) -> None:
    """Prevents an outdated list of parts: parts that are not listed would not be checked."""
    found = {
        path.stem
        for path in (ROOT / PACKAGE / subpackage).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(PARTS[subpackage])


def test_the_package_was_found() -> None:
    """Prevents the tests above from passing because they found no files."""
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
        ("training/loop.py", "from recycle_ds.unlisted import thing"),
        ("generate.py", "from recycle_ds.pretrain import main"),
        ("helpers/text.py", "import re"),
        ("__init__.py", "from recycle_ds.model import RecycleGPT"),
        ("training/engine/build.py", "from recycle_ds.training.loop import Trainer"),
        ("training/state.py", "from recycle_ds.training.engine.build import build_engine"),
        ("checkpoint/portable/reading.py", "from recycle_ds.checkpoint.run import resume"),
        ("checkpoint/files/new_folder.py", "from recycle_ds.checkpoint import load_model"),
        ("inference/speculation/sampling.py", "from recycle_ds.inference.stream import Stream"),
        ("training/unlisted.py", "from recycle_ds.training.errors import TrainingError"),
    ],
)
def test_a_wrong_import_is_detected(path: str, line: str) -> None:
    """Prevents a checker that does not detect one of the ways to write an import."""
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
def test_a_correct_import_is_accepted(path: str, line: str) -> None:
    """Prevents a checker that reports correct imports."""
    assert violations(line, path) == []
