"""Decoding requests of the command line: one prompt, printed as text or JSON, or one of many, returned as a record."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TextIO

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.data.tokenizer import TextStream
from recycle_ds.inference.console import TokenPrinter, figures_line, wants_colour
from recycle_ds.inference.generation import DecodingInterrupted, Generation
from recycle_ds.inference.loading import decoder_of, load
from recycle_ds.inference.parameters import SamplingParams, check_mode, check_runtime


class Request:
    """A decoding request of the command line. prompt: the text to continue; "" for many prompts, see `record_of_one`."""

    def __init__(
        self, model: str, prompt: str, mode: str, dtype: str, params: SamplingParams, threads: int | None
    ) -> None:
        """Checks what can be checked before the model is loaded, which may take long. Raises DecodingError."""
        check_mode(mode)
        check_runtime(dtype, threads)
        self.model, self.prompt, self.mode, self.dtype, self.threads = model, prompt, mode, dtype, threads
        self.params = params

    def run(self, out: TextIO, as_json: bool) -> bool:
        """Decodes and prints. Returns whether Ctrl-C interrupted it."""
        loaded = load(self.model, self.dtype, self.threads)
        tokenizer = loaded.tokenizer
        colour = not as_json and wants_colour(out)
        eos_ids = frozenset({tokenizer.eos_id})
        printer = TokenPrinter(
            TextStream(tokenizer), self.params.stop, eos_ids, self.mode, None if as_json else out, colour
        )
        interrupted = False
        try:
            generation = decoder_of(loaded).generate(
                tokenizer.encode(self.prompt),
                self.mode,
                self.params,
                max_new_tokens=self.params.max_new_tokens,
                draft_tokens=self.params.draft_tokens,
                stop=self.params.stop,
                on_tokens=printer.feed,
            )
        except DecodingInterrupted as interrupt:
            generation, interrupted = interrupt.generation, True
        printer.finish()
        if as_json:
            out.write(json.dumps(self._record(generation, printer), ensure_ascii=False) + "\n")
        elif out.isatty():
            out.write("\n")
        out.flush()
        print(figures_line(generation, self.mode, colour), file=sys.stderr, flush=True)
        return interrupted

    def record_of_one(self, loaded: LoadedModel, prompt: str, seed_offset: int) -> dict[str, object]:
        """Decodes a prompt without printing. `seed_offset` is added to the seed (modulo 2^63), so that every prompt has its own
        random numbers, independent of the order of the prompts."""
        tokenizer, seed = loaded.tokenizer, self.params.seed
        params = self.params if seed is None else replace(self.params, seed=(seed + seed_offset) % 2**63)
        printer = TokenPrinter(TextStream(tokenizer), self.params.stop, frozenset({tokenizer.eos_id}), self.mode, None)
        generation = decoder_of(loaded).generate(
            tokenizer.encode(prompt),
            self.mode,
            params,
            max_new_tokens=self.params.max_new_tokens,
            draft_tokens=self.params.draft_tokens,
            stop=self.params.stop,
            on_tokens=printer.feed,
        )
        printer.finish()
        return self._record(generation, printer)

    @property
    def settings(self) -> dict[str, object]:
        """Everything that determines a continuation, apart from the prompt and the model."""
        return {"mode": self.mode, "dtype": self.dtype, **asdict(self.params)}

    def _record(self, generation: Generation, printer: TokenPrinter) -> dict[str, object]:
        return {
            "text": printer.text,
            "token_ids": list(generation.token_ids),
            "recycled": list(generation.recycled),
            "mode": self.mode,
            "dtype": self.dtype,
            **generation.figures(),
        }
