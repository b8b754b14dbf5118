"""Steps wait for the device once, at their end: counted on the CPU, where operations that would wait on a GPU can be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.device.buffers import Outbox
from recycle_ds.inference.engine.plan import Outcome, Plan
from recycle_ds.inference.parameters import SamplingParams
from tests.unit.inference.engine.requests import free_drafts
from tests.unit.inference.models import random_model

# Methods that bring numbers to the host, and operations that do, or whose result has a size that the host has to learn.
_METHODS = ("cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "to", "pin_memory")
_OPERATIONS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "is_nonzero"),
    *("lift_fresh", "_to_copy.device"),  # torch.tensor: on a GPU a copy for which the host waits
)


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS and not (name == "to" and not any(isinstance(one, (str, torch.device)) for one in args)):
            self._found[name] += 1
        if name == "__getitem__" or name == "__setitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [one for one in index if isinstance(one, torch.Tensor) and one.dtype == torch.bool]
            self._found["mask"] += len(masks) + sum(isinstance(one, list) for one in index)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in _OPERATIONS:
            self._found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _sends(found: Counter[str]) -> Iterator[None]:
    """Counts copies to the host."""
    send = Outbox.send

    def counting(box: Outbox, parts: Sequence[torch.Tensor]) -> None:
        found["sent"] += 1
        send(box, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outbox, "send", counting)
        yield


def _transfers(prompts: list[list[int]], params: SamplingParams, mode: str, steps: str) -> list[Counter[str]]:
    """What each step that decodes brings to the host, or sends there before the host waits."""
    engine = free_drafts(local_engine(random_model(7, 2, max_positions=96, std=0.3), max_batch=4, steps=steps))  # type: ignore[arg-type]
    submit, collect, found = engine._executor.submit, engine._executor.collect, list[Counter[str]]()

    def counting(plan: Plan) -> None:
        # a request's bias and forbidden tokens are written when it comes; chunks of prompts are read without padding
        if plan.rules or any(part.start < part.prompt_tokens for part in plan.parts) or not plan.parts:
            submit(plan)
            return
        found.append(Counter())
        with _Operations(found[-1]), _Methods(found[-1]), _sends(found[-1]):
            submit(plan)

    def collecting() -> Outcome:
        found.append(Counter(received=1))
        with _Operations(found[-1]), _Methods(found[-1]):
            return collect()

    engine._executor.submit = counting  # type: ignore[method-assign]
    engine._executor.collect = collecting  # type: ignore[method-assign]
    for prompt in prompts:
        engine.add(prompt, params, mode)
    engine.finish(list(engine.scheduler.waiting))
    return found


_EVERYTHING = {
    **{"temperature": 0.8, "seed": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    **{
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logit_bias": {1: 0.5},
        "bad_tokens": (3,),
        "min_new_tokens": 4,
    },
}


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "seed": 3}, _EVERYTHING])
@pytest.mark.parametrize(
    ("mode", "drafts"), [("autoregressive", None), ("alternate", 2), ("verified", 3), ("verified", None)]
)
def test_a_step_waits_once(mode: str, drafts: int | None, changes: dict[str, Any]) -> None:
    """Prevents a wait for the device while a step is started, for a draft, penalty or sequence: one copy to the host ends it,
    for which the host waits when it needs the outcome."""
    params = SamplingParams(max_new_tokens=12, draft_tokens=drafts, **changes)
    for one in _transfers([[1, 2], [2, 3, 1], [4]], params, mode, "static"):
        assert {name: count for name, count in one.items() if count} in ({"sent": 1}, {"received": 1})


def test_the_counters_count() -> None:
    """Prevents counters that see nothing: without static buffers, there are waits for every depth of a tree."""
    found = _transfers([[1, 2]], SamplingParams(max_new_tokens=12), "verified", "flat")
    assert max(one["tolist"] for one in found) > 3 and max(one["lift_fresh"] for one in found) > 3
