"""Master weights and moments of ZeRO 0, which saves the optimizer's lists with the model's weights, without names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recycle_ds.checkpoint.deepspeed_native.loading import Keys, PtFiles, Span
from recycle_ds.checkpoint.deepspeed_native.ranks import MOMENTS, Stored


def with_optimizer(
    files: PtFiles, file: str, stored: dict[str, Stored], groups: Sequence[Sequence[str]]
) -> dict[str, Stored]:
    """Returns the parameters of a rank with the optimizer state of its model file; unchanged if the lists do not match.

    groups: names by optimizer group, in order. A master weight is used only if it rounds to exactly the weight of that name.
    """
    state: Keys = ("optimizer", "state")
    masters = files.find(file, ("optimizer", "fp32_groups"))
    if masters is not None:
        state = ("optimizer", "optimizer_state_dict", "state")
    saved = files.find(file, (*state[:-1], "param_groups"))
    if not groups or not _same_sizes(saved, groups):
        return stored
    found = dict(stored)
    position = 0
    for index, names in enumerate(groups):
        for member, name in enumerate(names):
            parameter = stored.get(name)
            if parameter is None:
                return stored
            if masters is not None:
                parameter = _with_master(files, file, parameter, ("optimizer", "fp32_groups", index, member))
                if parameter is None:
                    return stored
            found[name] = _with_moments(files, file, parameter, (*state, position))
            position += 1
    return found


def _same_sizes(saved: Any, groups: Sequence[Sequence[str]]) -> bool:
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        return False
    sizes = [len(members) if isinstance(members := group.get("params"), list) else -1 for group in saved]
    return sizes == [len(names) for names in groups]


def _with_master(files: PtFiles, file: str, parameter: Stored, keys: Keys) -> Stored | None:
    master = files.find(file, keys)
    elements = torch.Size(parameter.shape).numel()
    if not isinstance(master, Tensor) or tuple(master.shape) != parameter.shape or not master.is_floating_point():
        return None
    span = (Span(file, keys, 0, elements),)
    rounded = files.read(span, 0, elements).to(parameter.dtype)
    if not torch.equal(rounded, files.read(parameter.spans["weight"], 0, elements)):
        return None
    return Stored(parameter.shape, master.dtype, {"weight": span}, True)


def _with_moments(files: PtFiles, file: str, parameter: Stored, keys: Keys) -> Stored:
    spans = dict(parameter.spans)
    elements = torch.Size(parameter.shape).numel()
    for kind in MOMENTS:
        value = files.find(file, (*keys, kind))
        if isinstance(value, Tensor) and tuple(value.shape) == parameter.shape and value.is_floating_point():
            spans[kind] = (Span(file, (*keys, kind), 0, elements),)
    return replace(parameter, spans=spans)
