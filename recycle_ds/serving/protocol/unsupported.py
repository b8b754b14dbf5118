"""Fields of OpenAI's interface that this server does not have, and what to do instead."""

from __future__ import annotations

from typing import Any

_TOOLS = "tools are not supported: leave it out, or describe them in a message and parse the answer's text"
_FORMAT = "constrained output is not supported: leave it out, and check the answer's text yourself"
_TEXT_ONLY = "the model reads and writes text only: leave it out"
_NOT_STORED = "nothing is stored: leave it out"

UNSUPPORTED = {
    "suffix": "insertion is not supported: leave it out, and put all text into prompt",
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "parallel_tool_calls": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "response_format": _FORMAT,
    "guided_json": _FORMAT,
    "guided_regex": _FORMAT,
    "guided_choice": _FORMAT,
    "guided_grammar": _FORMAT,
    "structured_outputs": _FORMAT,
    "modalities": _TEXT_ONLY,
    "audio": _TEXT_ONLY,
    "prediction": "predicted output is not supported: leave it out; mode=verified drafts by itself",
    "reasoning_effort": "the model has no reasoning levels: leave it out, or use chat_template_kwargs",
    "verbosity": "the model has no verbosity levels: leave it out",
    "service_tier": "there are no service tiers: leave it out; see priority",
    "store": _NOT_STORED,
    "metadata": _NOT_STORED,
    "web_search_options": "there is no web search: leave it out",
    "use_beam_search": "beam search is not supported: leave it out",
    "length_penalty": "beam search is not supported: leave it out",
    "prompt_logprobs": "not supported by this name: use echo with logprobs in /v1/completions",
    "include_stop_str_in_output": "not supported: leave it out; the text ends before the stop string",
    "skip_special_tokens": "not supported: leave it out; special tokens are not part of the text",
    "spaces_between_special_tokens": "not supported: leave it out; special tokens are not part of the text",
    "add_special_tokens": "not supported: leave it out; no token is added to a prompt, write them, or send token ids",
    "truncate_prompt_tokens": "not supported: shorten the prompt yourself",
}
"""By name of the field: why it is refused, and the way out."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "use_beam_search": (False,),
    "length_penalty": (1.0, 1),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (False,),
}
# Values, of that very type, that ask for what this server does anyway.


def is_neutral(name: str, value: Any) -> bool:
    """Whether a field that is not supported has a value with which it asks for nothing: null, or what clients send for it."""
    if name not in UNSUPPORTED:
        return False
    return value is None or any(type(one) is type(value) and one == value for one in _NEUTRAL.get(name, ()))
