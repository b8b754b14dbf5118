"""What the command line asks of a decoder: a prompt continued on the terminal or as JSON, or one of many as a record."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TextIO

from recycle_ds.checkpoint import LoadedModel
from recycle_ds.data.tokenizer import TextStream
from recycle_ds.inference.console import TokenPrinter, figures_line, wants_colour
from recycle_ds.inference.decoder import check_mode
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import DecodingInterrupted, Generation
from recycle_ds.inference.loading import check_runtime, decoder_of, load
from recycle_ds.inference.speculation.sampling import SamplingParams
from recycle_ds.inference.speculation.stopping import check_stop_strings


class Request:
    """One prompt to continue, as asked for on the command line."""

    def __init__(
        self,
        model: str,
        prompt: str,
        mode: str,
        max_new_tokens: int,
        draft_tokens: int | None,
        dtype: str,
        params: SamplingParams,
        stop: tuple[str, ...],
        threads: int | None,
    ) -> None:
        """Raises DecodingError for what can be seen without the model, which may take long to load."""
        check_mode(mode)
        check_stop_strings(stop)
        check_runtime(dtype, threads)
        if max_new_tokens < 1:
            raise DecodingError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        self.model, self.prompt, self.mode, self.dtype, self.threads = model, prompt, mode, dtype, threads
        self.max_new_tokens, self.draft_tokens, self.params, self.stop = max_new_tokens, draft_tokens, params, stop

    def run(self, out: TextIO, as_json: bool) -> bool:
        """Decodes and prints. Returns whether Ctrl-C cut it short."""
        loaded = load(self.model, self.dtype, self.threads)
        tokenizer = loaded.tokenizer
        colour = not as_json and wants_colour(out)
        eos_ids = frozenset({tokenizer.eos_id})
        printer = TokenPrinter(TextStream(tokenizer), self.stop, eos_ids, self.mode, None if as_json else out, colour)
        interrupted = False
        try:
            generation = decoder_of(loaded).generate(
                tokenizer.encode(self.prompt),
                self.mode,
                self.params,
                max_new_tokens=self.max_new_tokens,
                draft_tokens=self.draft_tokens,
                stop=self.stop,
                on_tokens=printer.feed,
            )
        except DecodingInterrupted as cut:
            generation, interrupted = cut.generation, True
        printer.finish()
        if as_json:
            out.write(json.dumps(self._record(generation, printer), ensure_ascii=False) + "\n")
        elif out.isatty():
            out.write("\n")
        out.flush()
        print(figures_line(generation, self.mode, colour), file=sys.stderr, flush=True)
        return interrupted

    def record_of_one(self, loaded: LoadedModel, prompt: str, seed_offset: int) -> dict[str, object]:
        """Decodes a prompt silently. A seed is moved by `seed_offset`, so that prompts draw apart and in no order."""
        tokenizer, seed = loaded.tokenizer, self.params.seed
        params = self.params if seed is None else replace(self.params, seed=seed + seed_offset)
        printer = TokenPrinter(TextStream(tokenizer), self.stop, frozenset({tokenizer.eos_id}), self.mode, None)
        generation = decoder_of(loaded).generate(
            tokenizer.encode(prompt),
            self.mode,
            params,
            max_new_tokens=self.max_new_tokens,
            draft_tokens=self.draft_tokens,
            stop=self.stop,
            on_tokens=printer.feed,
        )
        printer.finish()
        return self._record(generation, printer)

    @property
    def settings(self) -> dict[str, object]:
        """What a continuation depends on, beside its prompt and the model."""
        return {
            "mode": self.mode,
            "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens,
            "draft_tokens": self.draft_tokens,
            "stop": list(self.stop),
            **asdict(self.params),
        }

    def _record(self, generation: Generation, printer: TokenPrinter) -> dict[str, object]:
        return {
            "text": printer.text,
            "token_ids": list(generation.token_ids),
            "recycled": list(generation.recycled),
            "mode": self.mode,
            "dtype": self.dtype,
            **generation.figures(),
        }
