"""One row while it is written: an opening, then turn by turn, until the model ends it, it is full or it repeats itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from recycle_ds.data.reading.report import InvalidRow
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.self_text.exclusion import Exclusion
from recycle_ds.inference.self_text.loops import Repetition
from recycle_ds.inference.self_text.prompts import RAW
from recycle_ds.inference.self_text.rows import RowPlan
from recycle_ds.inference.self_text.settings import SelfTextSettings
from recycle_ds.inference.self_text.turns import ChatFrame

QUESTION, ANSWER, OPENING, TEXT = "question", "answer", "opening", "text"
LOOP, TOO_SHORT, EXCLUDED, TOO_LONG = "loop", "too short", "excluded", "prompt too long"
REFUSED = "prompt refused by the chat template"
_FEWEST_OF_QUESTION = 3
_LONGEST_OPENING = 24
# Tokens that must be left in a row for another turn.
_ROOM_OF_TURN = 16


@dataclass(frozen=True)
class Writer:
    """What all rows share. chat: None for a model without chat template, whose rows are raw texts."""

    settings: SelfTextSettings
    tokenizer: Tokenizer
    chat: ChatFrame | None
    exclusion: Exclusion


class Row:
    """A row in progress. `tokens` is what the next request continues; `params` says how."""

    def __init__(self, plan: RowPlan, writer: Writer) -> None:
        self.plan = plan
        self._writer = writer
        self._settings = writer.settings
        self._repetition = Repetition(self._settings.ngram, self._settings.repeats)
        self.tokens: list[int] = []
        self.end: str | None = None
        """Why the row ended; None before."""
        self._answers = self._turn = 0
        self._follow_ups = list(plan.prompt.follow_ups) if plan.prompt else []
        self._start: int = 0
        self._begin()

    def _begin(self) -> None:
        prompt, chat, tokenizer = self.plan.prompt, self._writer.chat, self._writer.tokenizer
        if prompt is None and chat is not None:
            self._give(chat.frame.opening, QUESTION)
        elif prompt is None:
            start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            self._give([start], OPENING)
            self._start = int(start == tokenizer.eos_id)  # the end of the document before is not part of this one
        elif chat is not None and prompt.form != RAW:
            try:
                self._give(chat.first(prompt), ANSWER)
            except InvalidRow:  # noted before the first row was written
                self.end = REFUSED
                return
        else:
            self._give(tokenizer.encode(prompt.content), TEXT)
        if len(self.tokens) + self._settings.min_tokens > self._settings.row_tokens:
            self.end = TOO_LONG

    def _give(self, ids: list[int], state: str) -> None:
        """Adds tokens that the model has not written; what it writes next is of kind `state`."""
        self._repetition.start_turn()
        self._repetition.feed(ids, own=False)
        self._repetition.start_turn()
        self.tokens += ids
        self._state, self._turn_start = state, len(self.tokens)

    @property
    def params(self) -> SamplingParams:
        """Parameters of the next request."""
        settings, frame = self._settings, self._writer.chat
        room = settings.row_tokens - len(self.tokens)
        of_prompt = self._state in (QUESTION, OPENING)
        temperature = settings.prompt_temperature if of_prompt else self.plan.temperature
        params = SamplingParams(
            temperature=temperature,
            top_k=settings.top_k if temperature > 0 else 0,
            top_p=settings.top_p if temperature > 0 else 1.0,
            seed=self.plan.seed_of(self._turn),
            max_new_tokens=min(room, _LONGEST_OPENING) if self._state == OPENING else room,
        )
        if frame is None or self._state not in (QUESTION, ANSWER):
            return params
        end = frame.frame.question_end if self._state == QUESTION else frame.frame.answer_end
        fewest = min(_FEWEST_OF_QUESTION, room) if self._state == QUESTION else 0
        return replace(params, stop_tokens=() if end is None else (end,), min_new_tokens=fewest)

    def take(self, ids: list[int]) -> bool:
        """Adds tokens that the model has written. Returns whether the row has begun to repeat itself, and ends."""
        self.tokens += ids
        self._repetition.feed(ids, own=True)
        if self._repetition.cut is not None and self.end is None:
            self.end = LOOP
        return self.end == LOOP

    def end_turn(self) -> None:
        """Decides what follows the tokens of a request that has ended: another turn, or the end of the row."""
        if self._quotes_excluded():
            self.end = EXCLUDED
        if self.end is not None:
            return
        self._turn += 1
        last, chat, settings = self.tokens[-1], self._writer.chat, self._settings
        full = settings.row_tokens - len(self.tokens) < _ROOM_OF_TURN
        if self._state == OPENING and last not in self._writer.tokenizer.end_ids and not full:
            self._repetition.start_turn()
            self._state = TEXT
        elif self._state == QUESTION and chat is not None and last == chat.frame.question_end:
            self._next(chat.frame.to_answer, ANSWER)
        elif self._state == ANSWER and chat is not None and last == chat.frame.answer_end:
            self._answers += 1
            if self._answers >= settings.turns:
                self.end = "turns"
            elif self._follow_ups:
                self._next(chat.follow_up(self._follow_ups.pop(0)), ANSWER)
            elif chat.frame.question_end is None:
                self.end = "end of text"
            else:
                self._next(chat.frame.to_question, QUESTION)
        else:
            self.end = "end of text" if last in self._writer.tokenizer.end_ids else "length"

    def _quotes_excluded(self) -> bool:
        """Whether what the model has written in the user's place, or as a text of its own, quotes an excluded text, however
        it ended."""
        prompt_of_model = self._state in (QUESTION, OPENING) or (self._state == TEXT and self.plan.prompt is None)
        if not (prompt_of_model and self._writer.exclusion.texts):
            return False
        return self._writer.exclusion.matches(self._writer.tokenizer.decode(self.tokens[self._turn_start :]))

    def _next(self, ids: list[int], state: str) -> None:
        if self._settings.row_tokens - len(self.tokens) - len(ids) < _ROOM_OF_TURN:
            self.end = "length"
        else:
            self._give(ids, state)

    def record(self) -> dict[str, Any]:
        """The finished row, to be stored. `ids` is empty for a row that is left out."""
        repetition, plan = self._repetition, self.plan
        kept = len(self.tokens) if repetition.cut is None else repetition.cut
        own = repetition.own_tokens(kept)
        end = self.end
        if end not in (EXCLUDED, TOO_LONG, REFUSED) and own < self._settings.min_tokens:
            end = TOO_SHORT
        ids = self.tokens[self._start : kept] if end in ("turns", "end of text", "length", LOOP) else []
        if ids and ids[-1] == self._writer.tokenizer.eos_id:
            ids.pop()  # the token file adds it
        return {
            "row": plan.number,
            "kind": "free" if plan.prompt is None else plan.prompt.kind or plan.prompt.form,
            "temperature": plan.temperature,
            "end": end,
            "answers": self._answers,
            "written": repetition.own_tokens(),
            "written_repeated": repetition.repeated(),
            "own": own if ids else 0,
            "own_repeated": repetition.repeated(kept) if ids else 0,
            "cut": len(self.tokens) - kept,
            "ids": ids,
        }
