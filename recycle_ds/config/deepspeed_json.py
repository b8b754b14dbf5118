"""Reads DeepSpeed's JSON: a plain DeepSpeed file in which the values that the run config sets are "auto".

DeepSpeed itself ignores unknown top-level keys ("zero_optimisation" would run as ZeRO 0) and reads the same setting from
several places. Here an unknown key, or a value that contradicts the run config, is an error.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from recycle_ds.config.errors import ConfigError
from recycle_ds.config.schema import RunConfig
from recycle_ds.config.shipped import DEEPSPEED, find_config, names

AUTO = "auto"

OFFLOAD_IN_PIPELINE = (
    "in bf16 DeepSpeed then does not sum the tied embedding's gradients of the first and the last stage"
)
# At ZeRO 1, gradients of up to this many micro-batches per step are accumulated in bf16.
_MAX_BF16_MICRO_BATCHES = 8

# Top-level keys that DeepSpeed 0.19 reads and that make sense for pretraining.
_KNOWN = frozenset(
    {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("bf16", "data_types", "communication_data_type", "seq_parallel_communication_data_type"),
        *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio"),
        *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather"),
        *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
        *("comms_logger", "flops_profiler", "tensorboard", "csv_monitor", "wandb", "comet"),
        *("compile", "disable_python_gc_on_step"),
    }
)

_ZERO_KEYS = frozenset(
    {
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *(
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "round_robin_gradients",
            "ignore_unused_parameters",
        ),
        *("offload_param", "offload_optimizer", "sub_group_size", "cpu_offload_pin_memory", "elastic_checkpoint"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"),
        *(
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_gather_16bit_weights_on_model_save",
        ),
        *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "log_trace_cache_warnings"),
    }
)
_UNSUPPORTED_ZERO = frozenset(
    {
        *(
            "zenflow",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_gradients",
            "mics_shard_size",
        ),
        *(
            "zero_quantized_nontrainable_weights",
            "mics_hierarchical_params_gather",
            "compute_grad_norm",
            "legacy_stage1",
        ),
        *(
            "zeropp_loco_param",
            "cpu_offload",
            "cpu_offload_param",
            "cpu_offload_use_pin_memory",
            "load_from_fp32_weights",
        ),
    }
)
_EXAMPLES = {
    "zero_optimization": '{"stage": 1}',
    "bf16": '{"enabled": "auto"}',
    "data_types": '{"grad_accum_dtype": "fp32"}',
}

# DeepSpeed keys that the file may not contain, each with the reason or the setting to use instead.
_ELSEWHERE = {
    "optimizer": "the optimizer is AdamW from training.learning_rate, beta1, beta2, epsilon and weight_decay",
    "scheduler": "the schedule is training.schedule with training.warmup_steps",
    "fp16": "half precision is bf16: set training.dtype",
    "amp": "mixed precision is training.dtype",
    "torch_autocast": "it conflicts with megatron's linear layers: set training.dtype",
    "sequence_parallel_size": "set parallel.ulysses",
    "tensor_parallel": "set parallel.tensor",
    "activation_checkpointing": "set training.activation_checkpointing",
    "pipeline": "set parallel.pipeline",
    "elasticity": "DeepSpeed 0.19 has removed it; portable checkpoints resume at any number of ranks",
    "curriculum_learning": "not part of recycle_ds",
    "data_efficiency": "not part of recycle_ds",
    "checkpoint_engine": "checkpoints are written by recycle_ds",
}


def load_deepspeed_json(path: str) -> dict[str, Any]:
    """Reads the file and checks its keys. Raises ConfigError."""
    try:
        text = find_config(path, DEEPSPEED).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"deepspeed={path!r}: no such file; shipped ones are {', '.join(names(DEEPSPEED))}") from None
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
    for key in ("zero_optimization", "bf16", "data_types"):
        if not isinstance(tree.get(key, {}), dict):
            raise ConfigError(f"{path}: {key}={tree[key]!r}: must be an object, such as {_EXAMPLES[key]}")
    for key in tree:
        if key in _ELSEWHERE:
            raise ConfigError(f"{path}: {key!r} cannot be set here: {_ELSEWHERE[key]}")
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.5)
            raise ConfigError(f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    stage = zero_stage(tree)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{path}: zero_optimization.stage={stage!r}: must be 0, 1, 2 or 3")
    _check_nested(path, tree, stage)
    return tree


def _check_nested(path: str, tree: Mapping[str, Any], stage: int) -> None:
    """Rejects settings that recycle_ds's clipping and checkpoints do not support. Raises ConfigError."""
    zero = tree.get("zero_optimization", {})
    for key in zero:
        if key in _UNSUPPORTED_ZERO:
            raise ConfigError(f"{path}: zero_optimization.{key} is not supported by recycle_ds; remove it")
        if key not in _ZERO_KEYS:
            near = difflib.get_close_matches(key, _ZERO_KEYS, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: unknown key 'zero_optimization.{key}'{hint}")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            raise ConfigError(f'{path}: zero_optimization.{key}.device="nvme" is not supported; use "cpu"')
    if tree.get("bf16", {}).get("check_grad_overflow"):
        raise ConfigError(f"{path}: bf16.check_grad_overflow cannot be set here: set training.nonfinite instead")
    if tree.get("data_types", {}).get("grad_accum_dtype") == "fp32" and stage == 0:
        raise ConfigError(f'{path}: data_types.grad_accum_dtype="fp32" needs ZeRO 1, 2 or 3; use zero1.json')
    for key, min_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        if stage < min_stage and offloads(tree, key):
            raise ConfigError(
                f"{path}: zero_optimization.{key} has no effect at ZeRO {stage}: remove it, or use zero{min_stage}_offload.json"
            )


def zero_stage(tree: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed tree; 0 if none is given, as in DeepSpeed."""
    return (tree.get("zero_optimization") or {}).get("stage", 0)


def offloads(tree: Mapping[str, Any], key: str) -> bool:
    """Whether zero_optimization.offload_optimizer or offload_param (`key`) of a DeepSpeed tree moves anything to the host."""
    section = (tree.get("zero_optimization") or {}).get(key)
    return isinstance(section, dict) and section.get("device", "none") != "none"


def accumulates_in_fp32(stage: int, dtype: str, pipeline: int, micro_batches: int) -> bool:
    """Whether gradients are accumulated in fp32 if the DeepSpeed file does not set it.

    stage: ZeRO stage. dtype: training.dtype. micro_batches: per rank and step. Accumulating many micro-batches in bf16 loses
    small gradients, and a pipeline has many. At stage 1 fp32 costs an fp32 gradient for every weight, so few micro-batches
    without a pipeline stay in bf16; at stage 0 DeepSpeed supports bf16 only.
    """
    return dtype == "bf16" and (
        stage >= 2 or (stage == 1 and (pipeline > 1 or micro_batches > _MAX_BF16_MICRO_BATCHES))
    )


def resolve_deepspeed(config: RunConfig, data_size: int) -> dict[str, Any]:
    """The JSON of `config.deepspeed` with every "auto" filled in.

    data_size: number of ranks that read different samples. DeepSpeed treats Ulysses ranks, which hold the same weights, as
    data-parallel too, so its train_batch_size counts a sample once for each of them. Clipping is done by recycle_ds (per part
    under detached gradients), so DeepSpeed's own is set to 0. Raises ConfigError for a value that contradicts the run config,
    a batch that does not divide evenly, and settings that DeepSpeed does not support or computes wrongly in the run's layout.
    """
    tree = load_deepspeed_json(config.deepspeed)
    _check_layout(config, tree)
    training = config.training
    per_pass = training.micro_batch_size * data_size
    if training.global_batch_size % per_pass:
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of training.micro_batch_size "
            f"({training.micro_batch_size}) x data-parallel ranks ({data_size}) = {per_pass}"
        )
    micro_batches = training.global_batch_size // per_pass
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (training.global_batch_size, "training.global_batch_size"),
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, "training.micro_batch_size"),
        "gradient_accumulation_steps": (micro_batches, "training.global_batch_size"),
        "gradient_clipping": (training.gradient_clipping, "training.gradient_clipping"),
    }
    for key, (value, owner) in owned.items():
        tree[key] = _own(config.deepspeed, key, tree.get(key, AUTO), value, owner)
    tree["train_batch_size"] *= config.parallel.ulysses
    bf16 = dict(tree.get("bf16") or {})
    bf16["enabled"] = _own(
        config.deepspeed, "bf16.enabled", bf16.get("enabled", AUTO), training.dtype == "bf16", "training.dtype"
    )
    bf16["check_grad_overflow"] = False  # recycle_ds checks the norms itself, alike at every stage
    tree["bf16"] = bf16
    if accumulates_in_fp32(zero_stage(tree), training.dtype, config.parallel.pipeline, micro_batches):
        tree["data_types"] = {"grad_accum_dtype": "fp32"} | tree.get("data_types", {})
    tree["gradient_clipping"] = 0.0
    # The optimizer passed to DeepSpeed is a subclass of torch's AdamW that only adds the clipping factor.
    tree["zero_allow_untested_optimizer"] = True
    tree["zero_force_ds_cpu_optimizer"] = False
    # stages read their own copy of the batch, and do their own activation checkpointing
    tree["pipeline"] = {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False}
    tree.setdefault("steps_per_print", 2**31 - 1)
    return tree


def _check_layout(config: RunConfig, tree: Mapping[str, Any]) -> None:
    """Rejects what DeepSpeed computes wrongly or does not support with tensor parallelism or a pipeline."""
    stages, stage = config.parallel.pipeline, zero_stage(tree)
    tensor, dtype = config.parallel.tensor, config.training.dtype
    if stage == 0 and dtype == "bf16" and tensor * stages > 1:
        raise ConfigError(
            f"{config.deepspeed}: ZeRO 0 with training.dtype=bf16 at parallel.tensor={tensor}, parallel.pipeline={stages} "
            "gives wrong gradients in DeepSpeed: use zero1.json, or pipeline.json"
        )
    if stages == 1:
        return
    if stage > 1:
        raise ConfigError(
            f"{config.deepspeed}: ZeRO {stage} does not work with parallel.pipeline={stages}, since it partitions gradients "
            "that a pipeline still accumulates over its micro-batches: use pipeline.json (ZeRO 1), or parallel.tensor instead "
            "of parallel.pipeline"
        )
    if offloads(tree, "offload_optimizer"):
        raise ConfigError(
            f"{config.deepspeed}: offload_optimizer does not work with parallel.pipeline={stages}: {OFFLOAD_IN_PIPELINE}; "
            "use pipeline.json, or parallel.tensor instead of parallel.pipeline"
        )
    if config.recycle.gradient == "frozen_backbone":
        raise ConfigError(
            f"recycle.gradient=frozen_backbone does not work with parallel.pipeline={stages}: it trains the last stage only, "
            "and the others would hang; use parallel.tensor and ZeRO 3"
        )
    if config.training.compile:
        raise ConfigError(
            f"training.compile=true does not work with parallel.pipeline={stages}: leave it false, or use parallel.tensor"
        )


def _own(path: str, key: str, given: Any, value: Any, owner: str) -> Any:
    if given != AUTO and given != value:
        raise ConfigError(f'{path}: {key}={given!r} contradicts {owner}, which sets it to {value!r}; write "auto"')
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"the key {sorted(twice)[0]!r} is given twice")
    return dict(pairs)
