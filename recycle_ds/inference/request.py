"""Decoding requests of the command line: one prompt, printed as text or JSON, or one of many, returned as a record."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import TextIO

from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.answers import Job, answer_all
from recycle_ds.inference.console import TokenPrinter, figures_line, wants_colour
from recycle_ds.inference.decoder import decode_one
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import DecodingInterrupted, Generation
from recycle_ds.inference.loading import engine_of_ranks, load
from recycle_ds.inference.parameters import SEED_LIMIT, SamplingParams, check_mode, check_runtime
from recycle_ds.inference.ranks import Ranks
from recycle_ds.inference.text_stream import TextStream


class Request:
    """A decoding request of the command line. prompt: the text to continue; "" for many prompts, see `records`."""

    def __init__(
        self, model: str, prompt: str, mode: str, dtype: str, params: SamplingParams, threads: int | None
    ) -> None:
        """Checks what can be checked before the model is loaded, which may take long. Raises DecodingError."""
        check_mode(mode)
        check_runtime(dtype, threads)
        self.model, self.prompt, self.mode, self.dtype, self.threads = model, prompt, mode, dtype, threads
        self.params = params

    def run(self, out: TextIO, as_json: bool, ranks: Ranks, kv_memory_gib: float | None, explain: bool) -> bool:
        """Decodes and prints. Returns whether Ctrl-C interrupted it. Ranks that do not own their team's requests print
        nothing."""
        loaded = load(self.model, self.dtype, self.threads, ranks.device_index, ranks.mesh)
        engine = engine_of_ranks(loaded, ranks, self.params.n, kv_memory_gib)
        if engine is None:
            return False
        try:
            return self._print(engine, loaded.tokenizer, out, as_json, explain)
        finally:
            engine.close()

    def _print(self, engine: DecodingEngine, tokenizer: Tokenizer, out: TextIO, as_json: bool, explain: bool) -> bool:
        colour = not as_json and wants_colour(out)
        hidden = tokenizer.end_ids | set(self.params.stop_tokens)
        target = None if as_json else out
        prompt_ids = tokenizer.encode(self.prompt)
        text = TextStream(tokenizer, after=prompt_ids)
        least = self.params.min_new_tokens
        printer = TokenPrinter(text, self.params.stop, hidden, self.mode, target, colour, least)
        interrupted = False
        try:
            generation = decode_one(engine, prompt_ids, self.params, self.mode, printer.feed)
        except DecodingInterrupted as interrupt:
            generation, interrupted = interrupt.generation, True
        printer.finish()
        if as_json:
            out.write(json.dumps(self._record(generation, printer.text), ensure_ascii=False) + "\n")
        elif out.isatty():
            out.write("\n")
        out.flush()
        print(figures_line(generation, self.mode, colour), file=sys.stderr, flush=True)
        if explain:
            print(engine.explanation(), file=sys.stderr, flush=True)
        return interrupted

    def records(
        self, engine: DecodingEngine, tokenizer: Tokenizer, prompts: Iterable[tuple[int, str]]
    ) -> Iterator[tuple[int, dict[str, object] | DecodingError]]:
        """Continues indexed prompts together, without printing; yields a record or an error for each, in any order.

        The index, times n, is added to the seed (modulo 2^63), so that every prompt has its own random numbers,
        independent of the order of the prompts. With n > 1, a record has the other answers under "others".
        """

        def job(index: int, prompt: str) -> Job[int]:
            seed = self.params.seed
            params = (
                self.params if seed is None else replace(self.params, seed=(seed + index * self.params.n) % SEED_LIMIT)
            )
            return Job(index, prompt, params, self.mode)

        for index, answers in answer_all(engine, tokenizer, (job(*one) for one in prompts)):
            if isinstance(answers, DecodingError):
                yield index, answers
                continue
            first, *others = (self._record(answer, answer.text) for answer in answers)
            yield index, first | ({"others": others} if others else {})

    @property
    def settings(self) -> dict[str, object]:
        """Everything that determines a continuation, apart from the prompt and the model."""
        return {"mode": self.mode, "dtype": self.dtype, **asdict(self.params)}

    def _record(self, generation: Generation, text: str) -> dict[str, object]:
        return {
            "text": text,
            "token_ids": list(generation.token_ids),
            "recycled": list(generation.recycled),
            "mode": self.mode,
            "dtype": self.dtype,
            **({"logprobs": generation.logprobs} if generation.logprobs else {}),
            **generation.figures(),
        }
