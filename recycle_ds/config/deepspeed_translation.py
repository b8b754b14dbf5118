"""Old names in DeepSpeed files, and blocks that demand nothing."""

from __future__ import annotations

from typing import Any

from recycle_ds.config.deepspeed_keys import ADAMW_TYPES, ELSEWHERE, ELSEWHERE_DEFAULTS, ZERO

AUTO = "auto"
_OLD_ZERO_NAMES = {"stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save"}
_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


def translate(tree: dict[str, Any], notes: list[str], faults: list[str]) -> None:
    """Replaces old names in the tree by today's, with a note for each, and drops what demands nothing.

    notes, faults: lines are appended; a fault is an old name beside the one that has replaced it.
    """
    if "bfloat16" in tree:
        _rename(tree, "bfloat16", "bf16", "", notes, faults)
    zero = tree.get("zero_optimization")
    if isinstance(zero, bool):
        zero = {"stage": int(zero)}
        if zero["stage"] and "allgather_size" in tree:
            zero["allgather_bucket_size"] = tree.pop("allgather_size")
        notes.append(f"zero_optimization={bool(zero['stage'])} is an old form: read as {zero}")
        tree["zero_optimization"] = zero
    if isinstance(zero, dict):
        _translate_zero(zero, notes, faults)
    for key in [key for key in tree if key in ELSEWHERE and demands_nothing(tree[key], ELSEWHERE_DEFAULTS.get(key))]:
        del tree[key]
    optimizer = tree.get("optimizer")
    if isinstance(optimizer, dict) and str(optimizer.get("type")).lower() in ADAMW_TYPES:
        # nothing more than what runs anyway; numbers are compared with the run's by resolve_deepspeed
        params = optimizer.get("params") or {}
        defaults = {"torch_adam": False, "adam_w_mode": True}
        if set(optimizer) <= {"type", "params"} and isinstance(params, dict) and demands_nothing(params, defaults):
            del tree["optimizer"]


def demands_nothing(value: Any, default: Any = None) -> bool:
    """Whether a value is "auto", a default, a block that is not enabled, or a block of such values."""
    if value in (None, AUTO) or (value == default and isinstance(value, bool) == isinstance(default, bool)):
        return True
    if not isinstance(value, dict):
        return False
    if "enabled" in value and value["enabled"] in (False, AUTO):
        return True
    defaults = default if isinstance(default, dict) else {}
    return all(demands_nothing(inner, defaults.get(key)) for key, inner in value.items())


def _translate_zero(zero: dict[str, Any], notes: list[str], faults: list[str]) -> None:
    where = "zero_optimization."
    for old, new in _OLD_ZERO_NAMES.items():
        if old in zero:
            _rename(zero, old, new, where, notes, faults)
    for new in [key for key in ZERO if key.startswith("stage3_")]:  # DeepSpeed takes both forms
        if new.removeprefix("stage3_") in zero:
            _rename(zero, new.removeprefix("stage3_"), new, where, notes, faults)
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in _OFFLOADS.items():
        if old not in zero:
            continue
        value = zero.pop(old)
        if value is True and new in zero:
            faults.append(f"{where}{old} is an old name of {where}{new}, which is given too: remove the old one")
        elif value is True:
            zero[new] = {"device": "cpu"} | ({"pin_memory": pinned} if isinstance(pinned, bool) else {})
            notes.append(f"{where}{old} is an old name: read as {where}{new}={zero[new]}")
        elif not (value is False or value in (None, AUTO)):
            faults.append(f"{where}{old}={value!r}: must be true or false")


def _rename(section: dict[str, Any], old: str, new: str, where: str, notes: list[str], faults: list[str]) -> None:
    value = section.pop(old)
    if new in section:
        faults.append(f"{where}{old} is an old name of {where}{new}, which is given too: remove the old one")
        return
    section[new] = value
    notes.append(f"{where}{old} is an old name: read as {where}{new}")
