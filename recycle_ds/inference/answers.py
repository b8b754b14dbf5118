"""Answers to texts: encodes prompts, keeps the engine's batch full, and cuts the texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.console import TokenPrinter
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.engine.sequence import Sequence as Decoded
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.generation import Generation
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.text_stream import TextStream

Key = TypeVar("Key")


@dataclass(frozen=True)
class Answer(Generation):
    """A `Generation` with its prompt and its text. The text is cut before a stop string."""

    prompt: str = ""
    text: str = ""


@dataclass(frozen=True)
class Job(Generic[Key]):
    """A prompt to be continued. key: by which its answers are recognised. parse_special: whether special tokens that
    are written in the prompt stand for themselves; False for what a user wrote, where they are text."""

    key: Key
    prompt: str
    params: SamplingParams
    mode: str = "verified"
    priority: int = 0
    parse_special: bool = True


def answer_all(
    engine: DecodingEngine, tokenizer: Tokenizer, jobs: Iterable[Job[Key]], ahead: int = 0
) -> Iterator[tuple[Key, list[Answer] | DecodingError]]:
    """Continues prompts together, and yields the answers to each one as soon as they are complete, in any order.

    jobs: read only as far as the batch has room, and `ahead` more. A prompt that cannot be continued yields its error.
    Prompts that are still running when the iterator is closed are cancelled.
    """
    source = iter(jobs)
    running: dict[Key, tuple[Job[Key], list[Decoded]]] = {}
    exhausted = False
    try:
        while True:
            while (
                not exhausted and sum(job.params.n for job, _ in running.values()) < engine.scheduler.max_batch + ahead
            ):
                job = next(source, None)
                if job is None:
                    exhausted = True
                    break
                try:
                    ids = tokenizer.encode(job.prompt, parse_special=job.parse_special)
                    sequences = engine.add(ids, job.params, job.mode, priority=job.priority)
                except (DecodingError, DataError) as error:
                    yield job.key, error if isinstance(error, DecodingError) else DecodingError(str(error))
                    continue
                running[job.key] = job, sequences
            if not running:
                return
            engine.step()
            for key, (job, sequences) in list(running.items()):
                if all(sequence.ended_at is not None for sequence in sequences):
                    del running[key]
                    yield key, [_answer(tokenizer, job, sequence) for sequence in sequences]
    finally:
        for _, sequences in running.values():
            for sequence in sequences:
                engine.cancel(sequence)
        engine.settle()


def text_of(
    tokenizer: Tokenizer, params: SamplingParams, token_ids: Iterable[int], prompt_ids: Sequence[int] = ()
) -> str:
    """The text that new tokens add to a prompt, cut before the first stop string, without tokens that end it."""
    hidden = tokenizer.end_ids | set(params.stop_tokens)
    stream, least = TextStream(tokenizer, after=prompt_ids), params.min_new_tokens
    printer = TokenPrinter(stream, params.stop, hidden, "", None, least=least)
    ids = list(token_ids)
    printer.feed(ids, [False] * len(ids))
    printer.finish()
    return printer.text


def _answer(tokenizer: Tokenizer, job: Job[Key], sequence: Decoded) -> Answer:
    assert sequence.ended_at is not None
    generation = sequence.generation(sequence.ended_at)
    values = {field.name: getattr(generation, field.name) for field in fields(Generation)}
    prompt_ids = sequence.tokens[: sequence.prompt_tokens]
    text = text_of(tokenizer, job.params, generation.token_ids, prompt_ids)
    return Answer(**values, prompt=job.prompt, text=text)
