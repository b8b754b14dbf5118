"""What a model needs to write text: the frame of its chats, prompts that fit it, an engine with a cache for full rows."""

from __future__ import annotations

import sys
from pathlib import Path

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.data.reading.chat import ChatTemplate
from recycle_ds.data.reading.report import InvalidRow
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.engine.build import BLOCK_SIZE
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.loading import engine_of
from recycle_ds.inference.ranks import Ranks
from recycle_ds.inference.self_text.prompts import MESSAGES, PROMPT, RAW, PromptSet
from recycle_ds.inference.self_text.settings import SelfTextSettings
from recycle_ds.inference.self_text.turns import ChatFrame
from recycle_ds.parallel.device import free_memory, torch_dtype

_SHOWN = 5
"""Refused prompts that are shown; all are listed in the manifest."""


def chat_frame(loaded: LoadedModel) -> ChatFrame | None:
    """The frame of the model's chats; None for a model without a chat template. Raises DataError for one that cannot be
    used."""
    tokenizer = loaded.tokenizer
    beside = Path(tokenizer.name).with_name("chat_template.jinja").is_file()
    if not beside and not tokenizer.config.get("chat_template"):
        return None
    return ChatFrame(ChatTemplate.load(tokenizer.name, tokenizer), tokenizer)


def check_prompts(
    prompts: PromptSet, settings: SelfTextSettings, chat: ChatFrame | None, tokenizer: Tokenizer, *, warn: bool
) -> list[str]:
    """Places of the prompts that the model's chat template refuses, whose rows will be left out.

    warn: print a note about these, and about prompts that are probably not meant. Raises DecodingError for prompts that
    cannot be used with the model.
    """
    if chat is not None and chat.frame.question_end is None and settings.free:
        raise DecodingError(
            f"--free {settings.free}: the model's chat template writes no special token after a user's message, so "
            "that the model cannot end one of its own; use --free 0"
        )
    pattern, marked = tokenizer.special_pattern, 0
    refused: list[InvalidRow] = []
    places: list[str] = []
    every = (*prompts.train, *prompts.held_out)
    for prompt in every:
        if chat is None and (prompt.form == MESSAGES or prompt.follow_ups):
            raise DecodingError(f"{prompt.where}: a chat, but the model has no chat template; give raw texts")
        if chat is not None and prompt.follow_ups and chat.frame.answer_end is None:
            raise DecodingError(
                f"{prompt.where}: follow_ups, but the chat template writes no special token after an answer"
            )
        marked += chat is not None and prompt.form == PROMPT and bool(pattern.search(prompt.content))
        if chat is not None and prompt.form != RAW:
            try:
                chat.render(prompt)
            except InvalidRow as error:
                refused.append(error)
                places.append(prompt.where)
    if refused and len(refused) == len(every):
        raise DecodingError(f"all {len(every)} prompts are refused, the first one: {refused[0]}")
    if refused and warn:
        print(f"note: rows of {len(refused)} prompts are left out:", file=sys.stderr)
        for one in refused[:_SHOWN]:
            print(f"  {one}", file=sys.stderr)
        if len(refused) > _SHOWN:
            print(f"  and {len(refused) - _SHOWN} more, listed in self_text.json at the end", file=sys.stderr)
    if marked and warn:
        print(
            f"note: {marked} prompts contain special tokens of the model, which are plain text in a user's message; give "
            "a prompt that is complete already the key `raw`: true",
            file=sys.stderr,
            flush=True,
        )
    return places


def text_engine(loaded: LoadedModel, settings: SelfTextSettings, ranks: Ranks) -> DecodingEngine:
    """An engine whose cache has room for a full batch of full rows, so that none is ever preempted. Raises DecodingError if
    the memory does not suffice."""
    model, config = loaded.model, loaded.model.config
    layers = config.layers + model.recycle_layers
    hidden = config.hidden if model.recycle_layers else 0
    element = torch_dtype(settings.dtype).itemsize
    slot = (2 * config.kv_heads * config.dim_per_head * layers + hidden) * element + 8
    device = next(model.parameters()).device
    # of a row: a step may write behind its last token, and its blocks need not be full
    slots = settings.max_batch * (settings.row_tokens + 4 * BLOCK_SIZE)
    sharers = ranks.on_host if device.type == "cpu" else 1
    room = free_memory(device) // (2 * sharers)
    if slots * slot > room:
        raise DecodingError(
            f"--max-batch {settings.max_batch}: rows of {settings.row_tokens} tokens need {slots * slot / 2**30:.3g} GiB of KV "
            f"cache, half of the free memory is {room / 2**30:.3g} GiB; lower --max-batch or --row-tokens"
        )
    return engine_of(loaded, settings.max_batch, slots * slot / 2**30, ranks)
