"""Compiles the kernels with the machine's C compiler, once, and loads them.

They are optional: without a compiler, or on a processor without AVX-512, decoding uses PyTorch's products. Compiling for
this very processor takes some five seconds; the library is kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from recycle_ds.config.cache_folder import cache_folder

_FOLDER = Path(__file__).with_name("c")
_SOURCES = (
    "kernels.c",
    *(
        f"{name}.h"
        for name in (
            "attention",
            "choice",
            "exchange",
            "grow",
            "heads",
            "joint",
            "products",
            "screen",
            "stack",
            "vectors",
        )
    ),
)
# Without contraction, a sum is rounded in the same way wherever the compiler inlines it.
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_MOST_SECONDS = 120.0


class KernelsUnavailable(Exception):
    """The kernels cannot be used on this machine; the message is one line that says why."""


def kernels() -> ctypes.CDLL:
    """The compiled kernels, which are compiled if they are not in the cache folder yet. Raises KernelsUnavailable."""
    found = _loaded()
    if isinstance(found, str):
        raise KernelsUnavailable(found)
    return found


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none: a failure is not tried again."""
    try:
        return _load()
    except KernelsUnavailable as error:
        return str(error)


def _load() -> ctypes.CDLL:
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise KernelsUnavailable(f"they need Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    openmp = _openmp_of_torch()
    compiler = _compiler()
    folder = cache_folder()
    sources = {name: (_FOLDER / name).read_text(encoding="utf-8") for name in _SOURCES}
    key = (sources, _run([*compiler, "--version"]), _processor(), _FLAGS, openmp)
    name = f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so"
    if folder is not None and (folder / name).is_file():
        try:
            return _open(folder / name)
        except KernelsUnavailable:  # damaged: it is compiled again
            pass
    # compiled in a folder of its own and then moved: another process never sees half a library
    with tempfile.TemporaryDirectory(prefix="recycle_ds-") as scratch:
        built = _compile(compiler, Path(scratch), openmp)
        return _open(built if folder is None else _kept(built, folder / name))


def _kept(built: Path, path: Path) -> Path:
    """The library in the cache folder; where it was built if the disk is full or read-only, and every start compiles again."""
    copy = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, copy)
        os.replace(copy, path)
    except OSError:
        with contextlib.suppress(OSError):
            copy.unlink()
        return built
    return path


def _open(path: Path) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} cannot be loaded: {error}") from None
    library.recycle_ds_room.restype = ctypes.c_int64
    library.recycle_ds_run.restype = ctypes.c_int64
    library.recycle_ds_choice_room.restype = ctypes.c_int64
    library.recycle_ds_grow.restype = None
    library.recycle_ds_grow.argtypes = (pointer, pointer, integer, pointer, pointer)
    library.recycle_ds_multiply.restype = library.recycle_ds_choose.restype = None
    library.recycle_ds_multiply.argtypes = (pointer, integer, pointer, pointer, pointer, integer)
    library.recycle_ds_join.restype = library.recycle_ds_sample.restype = None
    library.recycle_ds_join.argtypes = (pointer, integer, *(pointer,) * 3, integer)
    library.recycle_ds_sample.argtypes = (pointer, *(integer,) * 3, *(pointer,) * 4, integer)
    library.recycle_ds_screen_room.restype = integer
    library.recycle_ds_likeliest.restype = None
    for function in ("room", "run", "choice_room", "choose", "screen_room", "likeliest"):
        getattr(library, f"recycle_ds_{function}").argtypes = (pointer, pointer)
    return library


def _compiler() -> list[str]:
    """The C compiler's command: $CC, or the first that is installed."""
    if os.environ.get("CC"):
        command = shlex.split(os.environ["CC"])
        if command and shutil.which(command[0]):
            return command
        raise KernelsUnavailable(f"there is no C compiler CC={os.environ['CC']!r}")
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise KernelsUnavailable("there is no C compiler; install gcc, or set CC to one")


def _compile(compiler: Sequence[str], folder: Path, openmp: str) -> Path:
    """Compiles into a folder. The library is linked with the OpenMP library that PyTorch has loaded: the threads of two
    would spin on the same cores and slow each other down tenfold."""
    compiled, linked = folder / "kernels.o", folder / "kernels.so"
    _run([*compiler, *_FLAGS, "-c", str(_FOLDER / "kernels.c"), "-o", str(compiled)])
    _run([*compiler, "-shared", str(compiled), openmp, "-lm", "-o", str(linked)])
    return linked


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"{command[0]} failed: {error}") from None
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        )
        reason = re.sub(r"^.*#error *", "", lines[0]).strip('" ')
        raise KernelsUnavailable(f"{command[0]} cannot compile them: {reason}")
    return done.stdout


def _openmp_of_torch() -> str:
    """Path of the OpenMP library in this process."""
    torch.get_num_threads()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name):
            return path
    raise KernelsUnavailable("PyTorch has loaded no OpenMP library")


def _processor() -> str:
    """What the compiler's -march=native depends on."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "\n".join(sorted(set(re.findall(r"^(?:flags|model name|model|cpu family)\s*:.*$", text, re.MULTILINE))))
