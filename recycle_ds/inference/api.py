"""Python interface: loads a model from a folder and continues prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.data.tokenizer import TextStream
from recycle_ds.inference.console import TokenPrinter
from recycle_ds.inference.decoder import Decoder
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import Generation
from recycle_ds.inference.loading import decoder_of, load
from recycle_ds.inference.parameters import SamplingParams, check_mode


@dataclass(frozen=True)
class Answer(Generation):
    """A `Generation` with its prompt and its text. The text is cut before a stop string."""

    prompt: str
    text: str


class Engine:
    """Decodes prompts with one model, in this process. Statistics for the draft length carry over to later prompts."""

    def __init__(self, loaded: LoadedModel, max_batch: int = 8) -> None:
        """max_batch: maximum prompts decoded at once; currently they are decoded one by one. Raises DecodingError."""
        if max_batch < 1:
            raise DecodingError(f"max_batch={max_batch}: must be at least 1")
        self.max_batch = max_batch
        self._loaded, self._decoder = loaded, decoder_of(loaded)

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, dtype: str = "fp32", max_batch: int = 8, threads: int | None = None
    ) -> Engine:
        """Loads the newest complete checkpoint of a run folder, a checkpoint, or a model folder of another known format.

        dtype: "fp32" or "bf16". threads: CPU threads; None keeps PyTorch's default. Raises DecodingError for an argument out of
        range and CheckpointError for a folder that cannot be loaded.
        """
        return cls(load(str(folder), dtype, threads), max_batch)

    @property
    def path(self) -> Path:
        """The checkpoint or model folder that was loaded."""
        return self._loaded.path

    @property
    def decoder(self) -> Decoder:
        """The decoder, for callers that work with token ids."""
        return self._decoder

    def generate(
        self, prompts: str | Sequence[str], params: SamplingParams | None = None, mode: str = "verified"
    ) -> Iterator[Answer]:
        """Continues the prompts in order. Each one is decoded when the iterator is advanced.

        prompts: one raw text or several. params: None means `SamplingParams()`. mode: "autoregressive", "alternate" or
        "verified". With a seed, equal prompts give equal answers. Raises DecodingError: immediately for an unknown mode, and
        during iteration for a prompt that cannot be continued.
        """
        check_mode(mode)
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        chosen = params or SamplingParams()
        return (self._answer(text, chosen, mode) for text in texts)

    def _answer(self, prompt: str, params: SamplingParams, mode: str) -> Answer:
        tokenizer = self._loaded.tokenizer
        printer = TokenPrinter(TextStream(tokenizer), params.stop, frozenset({tokenizer.eos_id}), mode, None)
        generation = self._decoder.generate(
            tokenizer.encode(prompt),
            mode,
            params,
            max_new_tokens=params.max_new_tokens,
            draft_tokens=params.draft_tokens,
            stop=params.stop,
            on_tokens=printer.feed,
        )
        printer.finish()
        return Answer(**vars(generation), prompt=prompt, text=printer.text)
