"""llama.cpp, through llama-cpp-python, as a peer in comparisons."""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recycle_ds.inference.bench.peers import Task
from recycle_ds.inference.bench.runs import Timed
from recycle_ds.inference.errors import DecodingError

# Names of its types of weights, and their numbers (enum llama_ftype in llama.h), by our dtype.
_TYPES = {"fp32": ("f32", 0), "bf16": ("bf16", 32), "int8": ("q8_0", 7)}
_GREEDY = {"temp": 0.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0}


class LlamaCpp:
    """The model of a GGUF file, with weights of the type that corresponds to `dtype`."""

    name = "llama.cpp"

    def __init__(self, gguf: Path, dtype: str, threads: int, context: int) -> None:
        """context: tokens of the longest prompt with its continuation. Raises DecodingError for a file that it cannot load."""
        library = import_module("llama_cpp")
        kind, number = _TYPES[dtype]
        # else it prints hundreds of lines; the callback must not be collected while the library may call it
        self._quiet = library.llama_log_callback(lambda level, text, data: None)
        library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.details: dict[str, Any] = {"version": version("llama-cpp-python"), "dtype": kind}
        with tempfile.TemporaryDirectory(prefix="llama-cpp-") as name:
            path = Path(name) / f"{kind}.gguf"
            _convert(library, gguf, path, number, threads)
            try:
                # mapped: the file may be removed afterwards
                self._model = library.Llama(
                    str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
                )
            except ValueError as error:
                raise DecodingError(f"{gguf}: {error}") from None

    def generate(self, prompt_ids: Sequence[int], task: Task) -> Timed:
        """See `Peer`."""
        sampling: dict[str, Any] = dict(_GREEDY)
        if task.temperature:
            sampling = {"temp": task.temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        if task.seed is not None:
            self._model.set_seed(task.seed % 2**32)
        ids: list[int] = []
        since = now = 0.0
        for token in self._model.generate(list(prompt_ids), repeat_penalty=1.0, **sampling):
            now = time.perf_counter()
            since = since or now
            ids.append(int(token))
            if token in task.end_ids or len(ids) == task.max_new_tokens:
                break
        return Timed(tuple(ids), len(ids) - 1, now - since)

    def close(self) -> None:
        """See `Peer`. Left to the end of the process, its destructor fails."""
        self._model.close()


def _convert(library: Any, source: Path, target: Path, number: int, threads: int) -> None:
    """Writes the model with weights of another type, from whatever type the source has."""
    settings = library.llama_model_quantize_default_params()
    settings.nthread, settings.ftype, settings.allow_requantize = threads, number, True
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise DecodingError(f"{source}: cannot be converted to the type of weights; give another GGUF file")
