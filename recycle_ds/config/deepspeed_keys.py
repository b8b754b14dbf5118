"""The keys of DeepSpeed 0.19's file: types, as DeepSpeed checks them, defaults, old names, and who sets what instead.

A test compares the tables with DeepSpeed's own classes, which cannot be imported here: they import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

Whole = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _short_dtype(value: Any) -> Any:
    """fp32 of torch.float32, float32 and float; DeepSpeed knows all of them."""
    short = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16"}
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return short.get(name, name) if isinstance(name, str) else name


def _never(value: Any) -> Any:
    """Infinity, which accelerate writes, and null as a number that no run reaches."""
    return 2**31 - 1 if value is None or value == float("inf") else value


Table: TypeAlias = Mapping[str, Any]
"""The type of each key of a block; a table in place of a type is a block inside."""

DTYPE = Annotated[Literal["fp32", "bf16"] | None, BeforeValidator(_short_dtype)]
COMMUNICATION = Annotated[Literal["fp32", "bf16", "fp16"] | None, BeforeValidator(_lower)]

OFFLOAD: Table = {
    "device": Literal["none", "cpu"], "nvme_path": str | None, "buffer_count": Whole, "pin_memory": bool,
}  # fmt: skip
ZERO: Table = {
    "stage": Literal[0, 1, 2, 3], "contiguous_gradients": bool, "reduce_scatter": bool,
    "reduce_bucket_size": Annotated[int, Field(gt=0)], "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool, "allgather_bucket_size": Whole, "overlap_comm": bool | None,
    "round_robin_gradients": bool, "ignore_unused_parameters": bool, "sub_group_size": Whole,
    "elastic_checkpoint": bool,
    "stage3_max_live_parameters": Whole, "stage3_max_reuse_distance": Whole, "stage3_prefetch_bucket_size": Whole,
    "stage3_param_persistence_threshold": Whole, "stage3_model_persistence_threshold": Whole,
    "stage3_gather_16bit_weights_on_model_save": bool, "stage3_module_granularity_threshold": int,
    "stage3_use_all_reduce_for_fetch_params": bool, "log_trace_cache_warnings": bool,
    "offload_param": {**OFFLOAD, "buffer_size": Whole, "max_in_cpu": Whole},
    "offload_optimizer": {
        **OFFLOAD, "pipeline_read": bool, "pipeline_write": bool, "fast_init": bool, "ratio": Share,
        "cpuadam_cores_perc": Share,
    },
}  # fmt: skip
# Keys of DeepSpeed that recycle_ds supports only at their default, which is given; None stands for several.
ZERO_DEFAULTS: Mapping[str, Any] = {
    "zenflow": None, "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False, "compute_grad_norm": True, "legacy_stage1": False,
    "load_from_fp32_weights": True, "mics_shard_size": -1, "mics_hierarchical_params_gather": False,
    "zeropp_loco_param": None, "memory_efficient_linear": True, "pipeline_loading_checkpoint": False,
    "override_module_apply": True, "enable_sanity_checks": False, "save_muon_momentum_buffer_in_memory": False,
    "parameter_alignment": False, "stage3_allgather_sequential": False, "leaf_module": {},
}  # fmt: skip
OFFLOAD_DEFAULTS: Mapping[str, Any] = {"super_offload": False}
BF16_DEFAULTS: Mapping[str, Any] = {
    "immediate_grad_update": False, "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False,
}  # fmt: skip

_MONITOR: Table = {"enabled": bool, "output_path": str, "job_name": str}
TOP: Table = {
    # of the run: compared with its configuration, see resolve_deepspeed
    "train_batch_size": Any, "train_micro_batch_size_per_gpu": Any, "gradient_accumulation_steps": Any,
    "gradient_clipping": Any, "bf16": {"enabled": bool, "check_grad_overflow": bool},
    "data_types": {"grad_accum_dtype": DTYPE},
    "communication_data_type": COMMUNICATION, "seq_parallel_communication_data_type": COMMUNICATION,
    "zero_optimization": ZERO,
    "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool,
    "aio": {
        "block_size": Whole, "queue_depth": Whole, "intra_op_parallelism": Whole, "single_submit": bool,
        "overlap_events": bool, "use_gds": Literal[False],
    },
    "prescale_gradients": bool, "gradient_predivide_factor": Annotated[float, Field(gt=0)],
    "disable_allgather": bool, "steps_per_print": Annotated[int, BeforeValidator(_never), Field(gt=0)],
    "wall_clock_breakdown": bool, "memory_breakdown": bool, "dump_state": bool,
    "log_level": Literal["debug", "info", "warning", "error", "critical"] | None,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list[str], "verbose": bool, "debug": bool},
    "flops_profiler": {
        "enabled": bool, "recompute_fwd_factor": float, "profile_step": Whole, "module_depth": int, "top_modules": Whole,
        "detailed": bool, "output_file": str | None,
    },
    "tensorboard": _MONITOR, "csv_monitor": _MONITOR,
    "wandb": {"enabled": bool, "group": str | None, "team": str | None, "project": str},
    "comet": {
        "enabled": bool, "samples_log_interval": int, "project": str | None, "workspace": str | None,
        "api_key": str | None, "experiment_name": str | None, "experiment_key": str | None, "online": bool | None,
        "mode": str | None,
    },
    "compile": {
        "deepcompile": bool, "autoep_non_moe": bool, "free_activation": bool, "free_activation_threshold": int,
        "offload_activation": bool, "offload_activation_pin_memory": bool, "offload_opt_states": bool,
        "double_buffer": bool, "symmetric_memory": bool, "debug_log": bool, "offload_parameters": bool,
        "sync_before_reduce": bool, "sync_after_reduce": bool, "sync_before_allgather": bool,
        "sync_after_allgather": bool, "keep_int_input_tensors": bool, "keep_all_input_tensors": bool,
        "passes": list[Literal["z1", "z3", "autosp", "autotp"]] | None,
    },
    "disable_python_gc_on_step": bool,
}  # fmt: skip

# Keys that the file may not set, each with the reason or the setting to use instead.
ELSEWHERE: Mapping[str, str] = {
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
    "gradient_allreduce_op": "gradients are averages over the global batch",
    "checkpoint": "checkpoints are written by recycle_ds",
    "checkpoint_engine": "checkpoints are written by recycle_ds",
    **dict.fromkeys(
        (
            "curriculum_learning", "data_efficiency", "nebula", "compression_training", "quantize_training",
            "sparse_gradients", "eigenvalue", "sparse_attention", "graph_harvesting", "progressive_layer_drop",
            "autotuning", "hybrid_engine", "weight_quantization", "dataloader_drop_last",
            "use_data_before_expert_parallelism",
        ),
        "not part of recycle_ds",
    ),
}  # fmt: skip
# Their defaults, where these are no demand; a block with "enabled": false demands nothing either.
ELSEWHERE_DEFAULTS: Mapping[str, Any] = {
    "sequence_parallel_size": 1, "sparse_gradients": False, "graph_harvesting": False, "dataloader_drop_last": False,
    "use_data_before_expert_parallelism": False, "gradient_allreduce_op": "mean",
    "tensor_parallel": {"autotp_size": 0, "tp_size": 1},
    "pipeline": {
        "stages": "auto", "partition": "best", "seed_layers": False, "activation_checkpoint_interval": 0,
        "pipe_partitioned": True, "grad_partitioned": True,
    },
    "activation_checkpointing": {
        "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
        "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False,
    },
    "checkpoint": {
        "tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False,
        "parallel_write": {"pipeline_stage": False},
    },
}  # fmt: skip
ADAMW_TYPES = ("adam", "adamw")
"""Optimizer types that DeepSpeed runs as AdamW, which is what recycle_ds runs."""
