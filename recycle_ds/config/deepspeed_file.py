"""Reads and checks one DeepSpeed file: what DeepSpeed reads is read, and all its faults are named at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from recycle_ds.config.deepspeed_keys import BF16_DEFAULTS, ELSEWHERE, OFFLOAD_DEFAULTS, TOP, ZERO_DEFAULTS, Table
from recycle_ds.config.deepspeed_translation import AUTO, demands_nothing, translate
from recycle_ds.config.errors import ConfigError
from recycle_ds.config.shipped import DEEPSPEED, find_config, names

# Values that are compared with the run's instead of with a type.
_OF_THE_RUN = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_ADAMW_PARAMS = ("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode")
# Keys of a block that have only one value in recycle_ds.
_ONLY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "zero_optimization": ZERO_DEFAULTS,
    "zero_optimization.offload_optimizer": OFFLOAD_DEFAULTS,
    "bf16": BF16_DEFAULTS,
    "data_types": {"param_dtype": None, "buffer_dtype": None, "keep_in_fp32_modules": AUTO},
}
_EXAMPLES = {
    "zero_optimization": '{"stage": 1}',
    "bf16": '{"enabled": "auto"}',
    "data_types": '{"grad_accum_dtype": "fp32"}',
}


def load_deepspeed_json(path: str, notes: list[str] | None = None) -> dict[str, Any]:
    """Reads the file and checks its keys and values.

    Like DeepSpeed, it reads JSON, and hjson: comments, trailing commas, names without quotes. Blocks that only say "auto" or
    repeat a default are dropped, old names are translated. notes: lines about translated names are appended.
    Raises ConfigError with all faults of the file in one line.
    """
    tree = _read(path)
    faults: list[str] = []
    found: list[str] = []
    translate(tree, found, faults)
    tree = _checked(tree, faults)
    if not any("zero_optimization" in fault for fault in faults):
        faults += _wrong_at_this_stage(tree)
    if faults:
        raise ConfigError(f"{path}: {'; '.join(faults)}")
    if notes is not None:
        notes += [f"{path}: {note}" for note in found]
    return tree


def zero_stage(tree: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed tree; 0 if none is given, as in DeepSpeed."""
    return int((tree.get("zero_optimization") or {}).get("stage", 0))


def offloads(tree: Mapping[str, Any], key: str) -> bool:
    """Whether zero_optimization.offload_optimizer or offload_param (`key`) of a DeepSpeed tree moves anything to the host."""
    section = (tree.get("zero_optimization") or {}).get(key)
    return isinstance(section, dict) and section.get("device", "none") != "none"


def _read(path: str) -> dict[str, Any]:
    try:
        text = find_config(path, DEEPSPEED).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"deepspeed={path!r}: no such file; shipped ones are {', '.join(names(DEEPSPEED))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"deepspeed={path!r}: cannot be read ({error})") from None
    if not text.strip():  # hjson would read it as {}
        raise ConfigError(f"{path}: the file is empty; write at least {{}}, which is ZeRO 0")
    try:
        try:
            tree = json.loads(text, object_pairs_hook=_no_duplicates)
        except json.JSONDecodeError:
            import hjson

            tree = hjson.loads(text, object_pairs_hook=_no_duplicates)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError, IndexError) as error:  # IndexError: hjson's, for a file that is cut
        number = getattr(error, "lineno", None)
        line = "" if number is None else f":{number}"
        reason = " ".join(str(getattr(error, "msg", "") or error).split())
        raise ConfigError(f"{path}{line}: not valid JSON: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def _checked(tree: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """The tree with values as DeepSpeed converts them, without those that are "auto". Appends what is wrong to `faults`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key in _OF_THE_RUN or (key == "optimizer" and _is_adamw(value)):
            found[key] = value
        elif key in ELSEWHERE:
            faults.append(f"{key!r} cannot be set here: {ELSEWHERE[key]}")
        elif key not in TOP:
            faults.append(_unknown(key, key, [*TOP, *ELSEWHERE]))
        else:
            _check(key, key, value, TOP[key], found, faults)
    return found


def _check(key: str, place: str, value: Any, kind: Any, found: dict[str, Any], faults: list[str]) -> None:
    if isinstance(kind, Mapping):
        if value is None and place.startswith("zero_optimization."):
            return  # no offload
        if isinstance(value, dict):
            found[key] = _checked_block(place, value, kind, faults)
        else:
            example = f", such as {_EXAMPLES[place]}" if place in _EXAMPLES else ""
            faults.append(f"{place}={value!r}: must be an object{example}")
    elif value == AUTO and place != "zero_optimization.stage":
        if place == "bf16.enabled":
            found[key] = AUTO
    else:
        try:
            found[key] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            faults.append(f"{place}={value!r}: {_expected(place, error)}")


def _checked_block(place: str, block: Mapping[str, Any], table: Table, faults: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    only = _ONLY_DEFAULTS.get(place, {})
    for key, value in block.items():
        inner = f"{place}.{key}"
        if key in only:
            if not demands_nothing(value, only[key]):
                faults.append(f"{inner}={value!r} is not supported by recycle_ds; remove it")
        elif key not in table:
            faults.append(_unknown(inner, key, list(table)))
        else:
            _check(key, inner, value, table[key], found, faults)
    return found


def _expected(place: str, error: ValidationError) -> str:
    if place.endswith(".device") and "nvme" in str(error.errors()[0].get("input")):
        return 'is not supported; use "cpu"'
    message = error.errors(include_url=False)[0]["msg"].partition(", unable to")[0]
    message = message.removeprefix("Input should be ").removeprefix("a valid ").partition(", got ")[0]
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    return f"must be {words.get(message, message)}"


def _unknown(place: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {place!r}" + (f", did you mean {near[0]!r}?" if near else "")


def _is_adamw(value: Any) -> bool:
    """Whether an optimizer block has only settings that can be compared with the run's."""
    if not isinstance(value, dict) or not set(value) <= {"type", "params"} or not isinstance(value.get("type"), str):
        return False
    params = value.get("params")
    known = isinstance(params, dict) and set(params) <= set(_ADAMW_PARAMS)
    return known and value["type"].lower() in ("adam", "adamw")


def _wrong_at_this_stage(tree: Mapping[str, Any]) -> list[str]:
    """Settings that recycle_ds's clipping and checkpoints do not support, or that have no effect at the ZeRO stage."""
    faults = []
    stage = zero_stage(tree)
    if tree.get("data_types", {}).get("grad_accum_dtype") == "fp32" and stage == 0:
        faults.append('data_types.grad_accum_dtype="fp32" needs ZeRO 1, 2 or 3; use zero1.json')
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if stage < least and offloads(tree, key):
            faults.append(
                f"zero_optimization.{key} has no effect at ZeRO {stage}: remove it, or use zero{least}_offload.json"
            )
    ratio = (tree.get("zero_optimization", {}).get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio < 1 and stage != 3:
        faults.append(f"zero_optimization.offload_optimizer.ratio={ratio} needs ZeRO 3, not {stage}: remove it")
    return faults


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"the key {sorted(twice)[0]!r} is given twice")
    return dict(pairs)
