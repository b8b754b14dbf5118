"""Other programs that decode the same model, for comparisons in the same run: how each is asked for, found and opened."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recycle_ds.inference.bench.runs import Timed
from recycle_ds.inference.errors import DecodingError

TRANSFORMERS, PROMPT_LOOKUP, LLAMA_CPP = "transformers", "prompt_lookup", "llama.cpp"
PEERS = (TRANSFORMERS, PROMPT_LOOKUP, LLAMA_CPP)
ALL = "all"
_MODULES = {TRANSFORMERS: "transformers", PROMPT_LOOKUP: "transformers", LLAMA_CPP: "llama_cpp"}
_PACKAGES = {TRANSFORMERS: "transformers", PROMPT_LOOKUP: "transformers", LLAMA_CPP: "llama-cpp-python"}


@dataclass(frozen=True)
class Task:
    """What every program is asked to do with a prompt. end_ids: tokens that end a text. seed: None for a random one."""

    max_new_tokens: int
    end_ids: tuple[int, ...]
    temperature: float = 0.0
    seed: int | None = None


class Peer(Protocol):
    """Another program with the model loaded."""

    name: str
    details: dict[str, Any]
    """For the report: version and arithmetic."""

    def generate(self, prompt_ids: Sequence[int], task: Task) -> Timed:
        """Continues a prompt. The time excludes the step over the prompt, as that of our own engine does."""

    def close(self) -> None:
        """Frees what the program does not free when the process ends."""


@dataclass(frozen=True)
class PeerRequest:
    """Peers to compare with. asked: they were named, so a missing one is an error; otherwise it is left out with a note.
    gguf: the model for llama.cpp, in any type: other types are made from it."""

    names: tuple[str, ...] = ()
    asked: bool = True
    gguf: Path | None = None
    lookup_tokens: int = 10
    """Tokens that prompt lookup drafts (`prompt_lookup_num_tokens`)."""

    @classmethod
    def parse(cls, text: str, gguf: Path | None = None) -> PeerRequest:
        """Reads `--peers`: names, comma-separated, "all" for those that are there, or nothing. Raises DecodingError."""
        words = tuple(dict.fromkeys(word for word in text.replace(" ", "").split(",") if word))
        if ALL in words and len(words) > 1:
            raise DecodingError(f"peers={text!r}: {ALL} already has every peer: give {ALL} alone, or names without it")
        for word in words if words != (ALL,) else ():
            if word not in PEERS:
                near = difflib.get_close_matches(word, PEERS, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise DecodingError(f"peers={word!r}: must be {ALL}, or of {', '.join(PEERS)}{hint}")
        names = PEERS if words == (ALL,) else words
        if gguf is not None and LLAMA_CPP not in names:
            raise DecodingError(
                f"gguf={str(gguf)!r}: only {LLAMA_CPP} uses it: add {LLAMA_CPP} to --peers, or omit --gguf"
            )
        if gguf is not None and not gguf.is_file():
            raise DecodingError(f"gguf={str(gguf)!r}: {'not a file' if gguf.exists() else 'no such file'}")
        return cls(names, words != (ALL,), gguf)


@dataclass
class OpenPeers:
    """Peers with the model loaded, and notes on those that were left out."""

    peers: list[Peer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Closes all of them."""
        for peer in self.peers:
            peer.close()


def why_missing(name: str, folder: Path, gguf: Path | None) -> str | None:
    """Why a peer cannot decode the model of a folder, and what would help; None if it can."""
    if importlib.util.find_spec(_MODULES[name]) is None:
        return f"{_PACKAGES[name]} is not installed: pip install {_PACKAGES[name]}"
    if name == LLAMA_CPP:
        if gguf is None or not gguf.is_file():
            return f"needs the model as GGUF: {'give --gguf FILE' if gguf is None else f'{gguf}: no such file'}"
        return None
    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        return f"{folder} is not a Hugging Face folder: convert it with tools/convert_checkpoint.py --to hf"
    return None


def check_peers(request: PeerRequest, folder: Path) -> None:
    """Raises DecodingError for a peer that was named and cannot be used, before a model is loaded."""
    for name in request.names if request.asked else ():
        reason = why_missing(name, folder, request.gguf)
        if reason is not None:
            raise DecodingError(f"peer {name}: {reason}")


def open_peers(request: PeerRequest, folder: Path, dtype: str, threads: int, context: int) -> OpenPeers:
    """Loads the model into every peer that can be used. context: tokens of the longest prompt with its continuation.

    A peer that cannot be used or loaded gets a note. Raises DecodingError instead if it was named.
    """
    check_peers(request, folder)
    found = OpenPeers()
    usable = []
    for name in request.names:
        reason = why_missing(name, folder, request.gguf)
        if reason is None:
            usable.append(name)
        else:
            found.notes.append(f"peer {name} left out: {reason}")
    lookups = {TRANSFORMERS: None, PROMPT_LOOKUP: request.lookup_tokens}
    wanted = {name: lookups[name] for name in usable if name in lookups}

    def transformers() -> list[Peer]:
        from recycle_ds.inference.bench.transformers_peer import open_transformers

        return open_transformers(folder, dtype, wanted)

    def llama_cpp() -> list[Peer]:
        from recycle_ds.inference.bench.llama_cpp_peer import LlamaCpp

        assert request.gguf is not None, "a peer without its model is not usable"
        return [LlamaCpp(request.gguf, dtype, threads, context)]

    if wanted:
        _load(tuple(wanted), transformers, found, request.asked)
    if LLAMA_CPP in usable:
        _load((LLAMA_CPP,), llama_cpp, found, request.asked)
    return found


def _load(names: tuple[str, ...], load: Callable[[], list[Peer]], found: OpenPeers, asked: bool) -> None:
    """Adds the peers that `load` opens, or a note. Raises DecodingError if it fails and they were asked for."""
    try:
        found.peers += load()
    except Exception as error:  # of another program, which raises what it likes when its installation is incomplete
        reason = " ".join(str(error).split()) or type(error).__name__
        if asked:
            found.close()
            raise DecodingError(
                f"peer {names[0]}: cannot be loaded ({reason}): repair it, or omit it from --peers"
            ) from None
        found.notes += [f"peer {name} left out: cannot be loaded ({reason})" for name in names]
