"""DeepSpeed's JSON by one route: a plain DeepSpeed file in which the values that the run config owns are "auto".

DeepSpeed itself ignores unknown top-level keys ("zero_optimisation" would run as ZeRO 0) and takes the same setting from
several places. Here an unknown key, or a value that contradicts the run config, is an error.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycle_ds.config.errors import ConfigError
from recycle_ds.config.schema import RunConfig

AUTO = "auto"

# Top-level keys that DeepSpeed 0.19 reads and that make sense for pretraining.
_KNOWN = frozenset(
    {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("bf16", "data_types", "communication_data_type", "seq_parallel_communication_data_type"),
        *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio"),
        *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather"),
        *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
        *("comms_logger", "flops_profiler", "tensorboard", "csv_monitor", "wandb", "comet"),
        *("compile", "pipeline", "activation_checkpointing", "disable_python_gc_on_step"),
    }
)

# Keys of DeepSpeed whose job another part of the run does: where to set it instead.
_ELSEWHERE = {
    "optimizer": "the optimizer is AdamW from training.learning_rate, beta1, beta2, epsilon and weight_decay",
    "scheduler": "the schedule is training.schedule with training.warmup_steps",
    "fp16": "half precision is bf16: set training.dtype",
    "amp": "mixed precision is training.dtype",
    "torch_autocast": "it clashes with megatron's linears: set training.dtype",
    "sequence_parallel_size": "set parallel.ulysses",
    "tensor_parallel": "set parallel.tensor",
    "activation_checkpointing.partition_activations": "set training.activation_checkpointing",
    "elasticity": "DeepSpeed 0.19 dropped it: portable checkpoints resume at any number of ranks",
    "curriculum_learning": "not part of recycle_ds",
    "data_efficiency": "not part of recycle_ds",
    "checkpoint_engine": "checkpoints are written by recycle_ds",
}


def load_deepspeed_json(path: str) -> dict[str, Any]:
    """Reads the file and checks its top-level keys. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"deepspeed={path!r}: no such file; shipped ones are in ds_configs/deepspeed/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"deepspeed={path!r}: cannot be read ({error})") from None
    try:
        tree = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    for key in tree:
        if key in _ELSEWHERE:
            raise ConfigError(f"{path}: {key!r} is not set here: {_ELSEWHERE[key]}")
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.5)
            raise ConfigError(f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    stage = zero_stage(tree)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{path}: zero_optimization.stage={stage!r}: must be 0, 1, 2 or 3")
    return tree


def zero_stage(tree: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed tree; 0 where none is given, as in DeepSpeed."""
    return (tree.get("zero_optimization") or {}).get("stage", 0)


def resolve_deepspeed(config: RunConfig, data_size: int) -> dict[str, Any]:
    """The JSON of `config.deepspeed` with every "auto" filled in.

    data_size is the number of data-parallel ranks. Clipping is done by recycle_ds (by part under detached gradients), so
    DeepSpeed's own is set to 0. Raises ConfigError for a value that contradicts the run config, and for a batch that does not
    divide.
    """
    tree = load_deepspeed_json(config.deepspeed)
    training = config.training
    per_pass = training.micro_batch_size * data_size
    if training.global_batch_size % per_pass:
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of training.micro_batch_size "
            f"({training.micro_batch_size}) x data-parallel ranks ({data_size}) = {per_pass}"
        )
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (training.global_batch_size, "training.global_batch_size"),
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, "training.micro_batch_size"),
        "gradient_accumulation_steps": (training.global_batch_size // per_pass, "training.global_batch_size"),
        "gradient_clipping": (training.gradient_clipping, "training.gradient_clipping"),
    }
    for key, (value, owner) in owned.items():
        tree[key] = _own(config.deepspeed, key, tree.get(key, AUTO), value, owner)
    bf16 = dict(tree.get("bf16") or {})
    bf16["enabled"] = _own(
        config.deepspeed, "bf16.enabled", bf16.get("enabled", AUTO), training.dtype == "bf16", "training.dtype"
    )
    tree["bf16"] = bf16
    tree["gradient_clipping"] = 0.0
    # The optimizer passed to DeepSpeed is a subclass of torch's AdamW that only adds the clipping factor.
    tree["zero_allow_untested_optimizer"] = True
    tree["zero_force_ds_cpu_optimizer"] = False
    tree.setdefault("steps_per_print", 2**31 - 1)
    return tree


def _own(path: str, key: str, given: Any, value: Any, owner: str) -> Any:
    if given != AUTO and given != value:
        raise ConfigError(f'{path}: {key}={given!r} contradicts {owner}, which makes it {value!r}; write "auto"')
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"the key {sorted(twice)[0]!r} is given twice")
    return dict(pairs)
