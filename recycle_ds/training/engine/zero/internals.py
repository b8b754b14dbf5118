"""What is used of DeepSpeed's optimizers beyond its public interface, and why deepspeed is pinned to 0.19.8.

DeepSpeed has no public interface for
- norms by part of the model: `step` of its optimizers computes one norm, between the reduction and the update, and at stage 0
  in fp32 none. Each class replaces the method that does so (`CALLS`) and reads the gradients from DeepSpeed's lists;
- masters and moments at every stage: its `safe_get` and `safe_set` functions work at stages 1 to 3 only, find moments only once
  they are linked, in the first step, and leave the weights that the model computes with as they are;
- the gradients of tied weights in a pipeline before the first backward pass.
Every class lists what it relies on (`USES`, `USES_OF_PARAMETER`); `moved` compares the lists with the installed DeepSpeed.
What is gone is an error when the engine is built, never a wrong norm. tests/parallel/test_deepspeed_internals.py builds the
engine of every class and also compares `FUNCTIONS`; with a new version of DeepSpeed it names what to adapt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from recycle_ds.training.engine.zero.adapter import Kind, Uses
from recycle_ds.training.errors import TrainingError

FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    safe_get_full_fp32_param: ("param",),
    safe_get_full_optimizer_state: ("param", "optim_state_key"),
    safe_set_full_fp32_param: ("param", "value"),
    safe_set_full_optimizer_state: ("param", "value", "optim_state_key"),
    safe_set_local_fp32_param: ("param", "value"),
    safe_set_local_optimizer_state: ("param", "value", "optim_state_key"),
    deepspeed.zero.register_external_parameter: ("module", "parameter"),
}
"""DeepSpeed's functions, with the parameters that they are called with."""


def moved(owner: Any, uses: Uses, calls: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """What `owner`, an object of DeepSpeed's, does not have as expected, one text each.

    uses: its attributes and methods. calls: a method, and the names of others or of attributes that its code must use.
    """
    name = type(owner).__name__
    found = []
    for key, parameters in uses.items():
        if not hasattr(owner, key):
            found.append(f"{name}.{key} is gone")
        elif parameters is not None:
            found += changed_parameters(f"{name}.{key}", getattr(type(owner), key), ("self", *parameters))
    for caller, every in (calls or {}).items():
        used = _original(getattr(type(owner), caller)).__code__.co_names
        found += [f"{name}.{caller} does not use {called}" for called in every if called not in used]
    return found


@contextmanager
def without_norms(module: ModuleType, *names: str) -> Iterator[None]:
    """Inside, these functions of one of DeepSpeed's modules return 0: they compute norms that are known already, for which it
    would wait for the device."""
    originals = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, lambda *_, **__: 0.0)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def other_version(faults: list[str]) -> TrainingError:
    """The error for a DeepSpeed in which something has moved. faults: as returned by `moved`."""
    return TrainingError(
        f"deepspeed {deepspeed.__version__} is not the one that this package was written for: {'; '.join(faults)}; "
        "install the version in requirements.txt"
    )


def changed_parameters(name: str, function: Callable[..., Any], expected: tuple[str, ...]) -> list[str]:
    """A text if the function does not take these parameters first, or needs more."""
    actual = list(inspect.signature(_original(function)).parameters.values())
    more = [
        one for one in actual[len(expected) :] if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    if tuple(one.name for one in actual[: len(expected)]) == expected and not more:
        return []
    return [f"{name} takes ({', '.join(map(str, actual))}) instead of ({', '.join(expected)})"]


def _original(function: Callable[..., Any]) -> Any:
    """The function inside decorators, also inside DeepSpeed's for profiling, which does not name it."""
    function = inspect.unwrap(function)
    for cell in (function.__closure__ or ()) if "<locals>" in function.__qualname__ else ():
        if inspect.isfunction(cell.cell_contents):
            return _original(cell.cell_contents)
    return function


def read_fp32(parameter: nn.Parameter, kind: Kind) -> Tensor:
    """The unpartitioned master weight or moment, at stages 1 to 3. Collective over the replicas."""
    value = safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)
    assert value is not None, f"DeepSpeed has no {kind} of this parameter"
    return value
