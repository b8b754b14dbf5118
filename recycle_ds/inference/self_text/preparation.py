"""What a model needs to write text: the frame of its chats, prompts that fit it, an engine with a cache for full rows."""

from __future__ import annotations

import sys
from pathlib import Path

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.data.reading.chat import ChatTemplate
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.engine.build import BLOCK_SIZE
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.loading import engine_of
from recycle_ds.inference.self_text.prompts import MESSAGES, PROMPT, PromptSet
from recycle_ds.inference.self_text.settings import SelfTextSettings
from recycle_ds.inference.self_text.turns import ChatFrame
from recycle_ds.parallel.device import free_memory, torch_dtype


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
) -> None:
    """Raises DecodingError or DataError for prompts that cannot be used with the model. warn: print a note about those that
    are probably not meant."""
    if chat is not None and chat.frame.question_end is None and settings.free:
        raise DecodingError(
            f"--free {settings.free}: the model's chat template writes no special token after a user's message, so "
            "that the model cannot end one of its own; use --free 0"
        )
    pattern, known = tokenizer.special_pattern, set[tuple[str, ...]]()
    marked = 0
    for prompt in (*prompts.train, *prompts.held_out):
        if chat is None and (prompt.form == MESSAGES or prompt.follow_ups):
            raise DecodingError(f"{prompt.where}: a chat, but the model has no chat template; give raw texts")
        if chat is not None and prompt.follow_ups and chat.frame.answer_end is None:
            raise DecodingError(
                f"{prompt.where}: follow_ups, but the chat template writes no special token after an answer"
            )
        marked += chat is not None and prompt.form == PROMPT and bool(pattern.search(prompt.content))
        if chat is not None and prompt.form == MESSAGES:
            roles = tuple(one["role"] for one in prompt.content)
            if roles not in known:  # templates refuse chats by their roles
                chat.first(prompt)
                known.add(roles)
    if marked and warn:
        print(
            f"note: {marked} prompts contain special tokens of the model, which are plain text in a user's message; give "
            "a prompt that is complete already the key `raw`: true",
            file=sys.stderr,
            flush=True,
        )


def text_engine(loaded: LoadedModel, settings: SelfTextSettings, ranks_on_host: int) -> DecodingEngine:
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
    sharers = ranks_on_host if device.type == "cpu" else 1
    room = free_memory(device) // (2 * sharers)
    if slots * slot > room:
        raise DecodingError(
            f"--max-batch {settings.max_batch}: rows of {settings.row_tokens} tokens need {slots * slot / 2**30:.3g} GiB of KV "
            f"cache, half of the free memory is {room / 2**30:.3g} GiB; lower --max-batch or --row-tokens"
        )
    return engine_of(loaded, settings.max_batch, slots * slot / 2**30, ranks_on_host)
