"""The DeepSpeed JSON of a run: a plain DeepSpeed file in which the values that the run config sets are "auto".

DeepSpeed itself ignores unknown top-level keys ("zero_optimisation" would run as ZeRO 0) and reads the same setting from
several places. Here an unknown key (see `deepspeed_file`), or a value that contradicts the run config, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recycle_ds.config.deepspeed_file import load_deepspeed_json, offloads, zero_stage
from recycle_ds.config.deepspeed_translation import AUTO
from recycle_ds.config.errors import ConfigError
from recycle_ds.config.schema import RunConfig, TrainingConfig

__all__ = ["accumulates_in_fp32", "load_deepspeed_json", "offloads", "resolve_deepspeed", "zero_stage"]

OFFLOAD_IN_PIPELINE = (
    "in bf16 DeepSpeed then does not sum the tied embedding's gradients of the first and the last stage"
)
# At ZeRO 1, gradients of up to this many micro-batches per step are accumulated in bf16.
_MAX_BF16_MICRO_BATCHES = 8


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
    under detached gradients), so DeepSpeed's own is set to 0. Raises ConfigError for all values that contradict the run config,
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
    bf16 = tree.get("bf16") or {}
    faults = [_contradiction(key, tree.get(key, AUTO), value, owner) for key, (value, owner) in owned.items()]
    faults.append(_contradiction("bf16.enabled", bf16.get("enabled", AUTO), training.dtype == "bf16", "training.dtype"))
    faults += _contradictions_of_optimizer(tree.pop("optimizer", {}), training)
    if any(faults):
        raise ConfigError(f'{config.deepspeed}: {"; ".join(filter(None, faults))}; write "auto"')
    tree |= {key: value for key, (value, _) in owned.items()}
    tree["train_batch_size"] *= config.parallel.ulysses
    # recycle_ds checks the norms itself, alike at every stage
    tree["bf16"] = {"enabled": training.dtype == "bf16", "check_grad_overflow": False}
    if accumulates_in_fp32(zero_stage(tree), training.dtype, config.parallel.pipeline, micro_batches):
        tree["data_types"] = {"grad_accum_dtype": "fp32"} | tree.get("data_types", {})
    tree["gradient_clipping"] = 0.0
    # The optimizer passed to DeepSpeed is a subclass of torch's AdamW that only adds the clipping factor.
    tree["zero_allow_untested_optimizer"] = True
    tree["zero_force_ds_cpu_optimizer"] = False
    # stages read their own copy of the batch, and do their own activation checkpointing
    tree["pipeline"] = {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False}
    tree.setdefault("steps_per_print", 2**31 - 1)
    # on by default, it waits for the GPU before every micro-batch and after every step
    tree.setdefault("timers", {"throughput": {"enabled": False}})
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
    if config.training.compile:
        raise ConfigError(
            f"training.compile=true does not work with parallel.pipeline={stages}: leave it false, or use parallel.tensor"
        )


def _contradiction(key: str, given: Any, value: Any, owner: str) -> str:
    return "" if given in (AUTO, value) else f"{key}={given!r} contradicts {owner}, which sets it to {value!r}"


def _contradictions_of_optimizer(block: Mapping[str, Any], training: TrainingConfig) -> list[str]:
    """What an AdamW block of the file says otherwise than the run."""
    values: dict[str, tuple[Any, str]] = {
        "lr": (training.learning_rate, "training.learning_rate"),
        "betas": ([training.beta1, training.beta2], "training.beta1 and beta2"),
        "eps": (training.epsilon, "training.epsilon"),
        "weight_decay": (training.weight_decay, "training.weight_decay"),
        "adam_w_mode": (True, "AdamW"),
    }
    params = block.get("params", {})
    return [
        _contradiction(f"optimizer.params.{key}", params[key], value, owner)
        for key, (value, owner) in values.items()
        if key in params
    ]
