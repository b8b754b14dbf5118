"""Python interface: loads a model from a folder and continues prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.inference.answers import Answer, Job, answer_all
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.loading import engine_of, load
from recycle_ds.inference.parameters import SamplingParams, check_batch, check_mode


class Engine:
    """Decodes prompts with one model, in this process, many at once. Statistics of drafts carry over to later prompts."""

    def __init__(self, loaded: LoadedModel, max_batch: int = 8, kv_memory_gib: float | None = None) -> None:
        """See `from_folder`."""
        check_batch(max_batch, kv_memory_gib)
        self.max_batch = max_batch
        self._loaded = loaded
        self._engine = engine_of(loaded, max_batch, kv_memory_gib)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: str = "fp32",
        max_batch: int = 8,
        threads: int | None = None,
        kv_memory_gib: float | None = None,
    ) -> Engine:
        """Loads the newest complete checkpoint of a run folder, a checkpoint, or a model folder of another known format.

        dtype: "fp32", "bf16", or "int8" (bf16 with weights of 8 bits). max_batch: prompts decoded at once.
        threads: CPU threads; None keeps PyTorch's default. kv_memory_gib: memory of the KV cache, allocated once; None:
        enough for max_batch prompts of the longest context, but at most half of the free memory. Raises DecodingError
        for an argument out of range, and CheckpointError for a folder that cannot be loaded.
        """
        check_batch(max_batch, kv_memory_gib)
        return cls(load(str(folder), dtype, threads), max_batch, kv_memory_gib)

    @property
    def path(self) -> Path:
        """The checkpoint or model folder that was loaded."""
        return self._loaded.path

    @property
    def engine(self) -> DecodingEngine:
        """The engine itself, for callers that work with token ids, priorities or single steps."""
        return self._engine

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        mode: str = "verified",
        *,
        parse_special: bool = True,
    ) -> Iterator[Answer]:
        """Continues the prompts together, `max_batch` at once, and yields the answers in the order of the prompts.

        prompts: one raw text or several. params: None means `SamplingParams()`; with n > 1 each prompt has n answers.
        mode: "autoregressive", "alternate" or "verified". parse_special: whether special tokens that are written in a
        prompt (`<|endoftext|>`) stand for themselves; False for what users write: they are then text. An answer depends
        on its prompt and parameters alone, not on what is decoded beside it; with a seed, equal prompts give equal
        answers. Raises DecodingError: immediately for an unknown mode and for prompts that are no texts, and during
        iteration for a prompt that cannot be continued.
        """
        check_mode(mode)
        texts = _checked((prompts,) if isinstance(prompts, str) else prompts)
        if params is not None and not isinstance(params, SamplingParams):
            raise DecodingError(f"params: of type {type(params).__name__}; give SamplingParams(...)")
        params = params or SamplingParams()
        return self._answers([Job(index, text, params, mode, 0, parse_special) for index, text in enumerate(texts)])

    def _answers(self, jobs: Sequence[Job[int]]) -> Iterator[Answer]:
        complete: dict[int, list[Answer] | DecodingError] = {}
        next_index = 0
        for index, answers in answer_all(self._engine, self._loaded.tokenizer, jobs):
            complete[index] = answers
            while next_index in complete:
                found = complete.pop(next_index)
                next_index += 1
                if isinstance(found, DecodingError):
                    raise found
                yield from found


def _checked(prompts: object) -> tuple[str, ...]:
    """The texts. Raises DecodingError, with the prompt's number, for anything else and for text that is not valid Unicode."""
    if not isinstance(prompts, Iterable) or isinstance(prompts, dict):
        raise DecodingError(f"prompts={prompts!r}: must be a text or a sequence of texts")
    texts = tuple(prompts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DecodingError(
                f"prompt {number} is of type {type(text).__name__}: must be a text (`engine.engine.add` takes token ids)"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DecodingError(
                f"prompt {number} has half of a surrogate pair at character {error.start}: give valid Unicode"
            ) from None
    return texts
