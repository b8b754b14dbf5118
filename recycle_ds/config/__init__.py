"""Typed configuration of a run: schema, YAML and dotted overrides, DeepSpeed JSON."""

from recycle_ds.config.deepspeed_json import load_deepspeed_json, resolve_deepspeed
from recycle_ds.config.errors import ConfigError, RecycleError
from recycle_ds.config.loading import build_section, load_config, parse_config, save_config
from recycle_ds.config.model_sections import ModelConfig, RecycleConfig, RopeConfig, RopeScaling
from recycle_ds.config.schema import (
    DataConfig,
    ParallelConfig,
    PrepareConfig,
    ProfileConfig,
    RunConfig,
    TokenSource,
    TrainingConfig,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "ParallelConfig",
    "PrepareConfig",
    "ProfileConfig",
    "RecycleConfig",
    "RecycleError",
    "RopeConfig",
    "RopeScaling",
    "RunConfig",
    "TokenSource",
    "TrainingConfig",
    "build_section",
    "load_config",
    "load_deepspeed_json",
    "parse_config",
    "resolve_deepspeed",
    "save_config",
]
