"""DeepSpeed files as users have them: hjson, old names, blocks that demand nothing, and all faults in one message."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hjson
import pytest

from recycle_ds.config import ConfigError, load_config, load_deepspeed_json, resolve_deepspeed
from recycle_ds.config.deepspeed_keys import BF16_DEFAULTS, OFFLOAD_DEFAULTS, TOP, ZERO, ZERO_DEFAULTS
from tests.runs import ROOT

RUNS = ROOT / "ds_configs" / "runs"

# The file that Hugging Face's Trainer documents for ZeRO 3, with all its "auto".
TRAINER: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
        "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip


def written(path: Path, tree: object) -> str:
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return str(path)


def error_of(path: Path, tree: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_json(written(path, tree))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{\n  // stage 1\n  "zero_optimization": {"stage": 1,}, # the default\n  /* more\n */ "steps_per_print": 100,\n}',
        "{\n  zero_optimization: {\n    stage: 1\n  }\n  steps_per_print: 100\n}",
        "zero_optimization: {stage: 1}\nsteps_per_print: 100",
        '\ufeff{"zero_optimization": {"stage": 1}, "steps_per_print": 100}',
    ],
)
def test_what_deepspeed_reads_is_read(tmp_path: Path, text: str) -> None:
    """Prevents the refusal of comments and trailing commas, and values that are read differently than by DeepSpeed."""
    expected = {"zero_optimization": {"stage": 1}, "steps_per_print": 100}
    assert load_deepspeed_json(written(tmp_path / "ds.json", text)) == expected
    assert hjson.loads(text.removeprefix("\ufeff")) == expected, "by DeepSpeed's parser"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 1}', "not valid JSON"),
        (
            '{"zero_optimization": {"stage": 1 "overlap_comm": true}}',
            "zero_optimization.stage='1 \"overlap_comm\": true}}'",
        ),
        ('{"train_batch_size": 1, "train_batch_size": 2}', "the key 'train_batch_size' is given twice"),
        ("{train_batch_size: 1\ntrain_batch_size: 2}", "the key 'train_batch_size' is given twice"),
        ('[{"stage": 1}]', "expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"train_batch_size": ' + "1" * 5000 + "}", "not valid JSON"),
        ("", "the file is empty"),
    ],
)
def test_broken_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    """Prevents a traceback of the parser, and a damaged file that is read as another setting."""
    found = error_of(tmp_path / "ds.json", text)
    assert message in found or "not valid JSON" in found


def test_the_file_of_the_trainer(tmp_path: Path) -> None:
    """Prevents three runs for three errors: only the schedule, which the run sets, has to go."""
    message = error_of(tmp_path / "ds.json", TRAINER)
    assert message.endswith(
        "'scheduler' cannot be set here: the schedule is training.schedule with training.warmup_steps"
    )
    path = written(tmp_path / "ds.json", {key: value for key, value in TRAINER.items() if key != "scheduler"})
    config = load_config(RUNS / "demo.yaml", [f"deepspeed={path}"])
    tree = resolve_deepspeed(config, 2)
    assert tree["zero_optimization"]["stage"] == 3 and "auto" not in json.dumps(tree)
    assert not {"fp16", "optimizer", "scheduler"} & set(tree)
    broken = TRAINER | {
        "fp16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_com": True, "reduce_bucket_size": "big"},
        "steps_per_prin": 10,
    }  # fmt: skip
    message = error_of(tmp_path / "ds.json", broken)
    for part in (
        *("'fp16' cannot be set here", "'scheduler' cannot be set here", "unknown key 'steps_per_prin', did you mean"),
        *(
            "unknown key 'zero_optimization.overlap_com', did you mean 'overlap_comm'?",
            "reduce_bucket_size='big': must be a",
        ),
    ):
        assert part in message


def test_all_contradictions_come_together(tmp_path: Path) -> None:
    """Prevents one run for each value that contradicts the run's configuration."""
    params = {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8}
    tree = {
        "train_batch_size": 5, "gradient_clipping": 0.5, "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": params}, "zero_optimization": {"stage": 1},
    }  # fmt: skip
    config = load_config(RUNS / "demo.yaml", [f"deepspeed={written(tmp_path / 'ds.json', tree)}"])
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed(config, 2)
    for part in ("train_batch_size=5", "gradient_clipping=0.5", "bf16.enabled=True", "optimizer.params.lr=1e-05"):
        assert f"{part} contradicts" in str(caught.value)
    assert "betas" not in str(caught.value) and "eps" not in str(caught.value), "equal values are no contradiction"


NOTHING: dict[str, Any] = {
    "fp16": {"enabled": False, "loss_scale": 128}, "amp": {"enabled": "auto"}, "torch_autocast": {"enabled": False},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "pipeline": {"stages": "auto"}, "sequence_parallel_size": 1, "tensor_parallel": {"autotp_size": 0},
    "elasticity": {"enabled": False}, "sparse_gradients": False, "checkpoint": {}, "gradient_allreduce_op": "mean",
    "curriculum_learning": {"enabled": False}, "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
    "optimizer": {"type": "auto", "params": "auto"}, "communication_data_type": "auto", "steps_per_print": "auto",
    "compression_training": {}, "data_types": {"grad_accum_dtype": "auto", "param_dtype": None},
    "bf16": {"enabled": "auto", "immediate_grad_update": False, "check_grad_overflow": True},
    "zero_optimization": {
        "stage": 1, "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "mics_shard_size": -1,
        "compute_grad_norm": True, "offload_param": None, "cpu_offload": False, "overlap_comm": None,
        "zenflow": None, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "none", "super_offload": False},
    },
}  # fmt: skip


def test_blocks_that_demand_nothing(tmp_path: Path) -> None:
    """Prevents the refusal of a block that changes nothing, and its way to DeepSpeed, which rejects some of them."""
    path = written(tmp_path / "ds.json", NOTHING)
    config = load_config(RUNS / "demo.yaml", [f"deepspeed={path}"])
    tree = resolve_deepspeed(config, 2)
    assert tree["zero_optimization"] == {"stage": 1, "overlap_comm": None, "offload_optimizer": {"device": "none"}}
    assert not set(tree) & (set(NOTHING) - {"bf16", "zero_optimization", "pipeline", "data_types", "steps_per_print"})
    for key, value in (
        *(
            ("fp16", {"enabled": True}),
            ("sequence_parallel_size", 2),
            ("sparse_gradients", True),
            ("elasticity", {"a": 1}),
        ),
        *(("activation_checkpointing", {"profile": True}), ("pipeline", {"stages": 4}), ("amp", True)),
        *(("gradient_allreduce_op", "sum"), ("optimizer", {"type": "Lamb"}), ("optimizer", {"type": "Adam", "lr": 1})),
    ):
        assert f"{key!r} cannot be set here" in error_of(tmp_path / "ds.json", {key: value})
    for key, value in (("zero_hpz_partition_size", 8), ("mics_shard_size", 8), ("zero_quantized_weights", True)):
        message = error_of(tmp_path / "ds.json", {"zero_optimization": {"stage": 3, key: value}})
        assert f"zero_optimization.{key}={value!r} is not supported by recycle_ds; remove it" in message


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}, "bfloat16 is an old name: read as bf16"),
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}, "zero_optimization=True is an old form"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": True}},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
            "cpu_offload is an old name: read as zero_optimization.offload_optimizer",
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload_param": True}},
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            "cpu_offload_param is an old name",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}},
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
            "read as zero_optimization.stage3_gather_16bit_weights_on_model_save",
        ),
        (
            {"zero_optimization": {"stage": 3, "max_live_parameters": 5}},
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 5}},
            "read as zero_optimization.stage3_max_live_parameters",
        ),
    ],
)
def test_old_names_are_translated_and_told(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], note: str) -> None:
    """Prevents the refusal of an old name, and a setting of it that is lost."""
    notes: list[str] = []
    assert load_deepspeed_json(written(tmp_path / "ds.json", old), notes) == new
    assert len(notes) == 1 and note in notes[0] and str(tmp_path / "ds.json") in notes[0]
    both = {
        key: {**value, **new.get(key, {})} if isinstance(value, dict) else value for key, value in (new | old).items()
    }
    if both not in (old, new):
        assert "which is given too: remove the old one" in error_of(tmp_path / "ds.json", both)


def leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All keys of the tables, with their types."""
    for key, kind in table.items():
        yield from leaves(kind, (*path, key)) if isinstance(kind, Mapping) else [((*path, key), kind)]


LEAVES = [path for path, kind in leaves(TOP) if kind is not Any]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 5e8, 0.5, float("inf"), float("nan"), "", "auto", "cpu", "none", "nvme", "fp32", "fp16"),
    *("true", "no", "5", "1.5", "info", "z1", [], ["z1"], ["all_reduce"], {}, {"a": 1}),
]  # fmt: skip


def test_what_is_accepted_here_is_accepted_by_deepspeed(tmp_path: Path) -> None:
    """Prevents a value that passes here and ends the run later, with a traceback of DeepSpeed on every rank."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_config(RUNS / "demo.yaml", [f"deepspeed={tmp_path / 'ds.json'}", "training.dtype=bf16"])
    accepted = 0
    for path in LEAVES:
        for value in VALUES:
            tree: dict[str, Any] = {"zero_optimization": {"stage": 3 if "offload_param" in path else 1}}
            section = tree
            for part in path[:-1]:
                section = section.setdefault(part, {})
            section[path[-1]] = value
            written(tmp_path / "ds.json", tree)
            try:
                resolved = resolve_deepspeed(config, 1)
            except ConfigError as error:
                assert "\n" not in str(error)
                continue
            accepted += 1
            DeepSpeedConfig(resolved)
    assert accepted > len(LEAVES)


def test_the_tables_have_all_keys_of_deepspeed() -> None:
    """Prevents a key of a later DeepSpeed, or a changed default, from being refused as unknown or passed unchecked."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def keys(section: Any) -> set[str]:
        return {
            field.alias or name
            for name, field in section.model_fields.items()
            if not (field.json_schema_extra or {}).get("deprecated")
        }

    removed = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    assert keys(DeepSpeedZeroConfig) == (set(ZERO) | set(ZERO_DEFAULTS)) - removed
    assert keys(DeepSpeedZeroOffloadOptimizerConfig) == set(ZERO["offload_optimizer"]) | set(OFFLOAD_DEFAULTS)
    assert keys(DeepSpeedZeroOffloadParamConfig) == set(ZERO["offload_param"])
    assert keys(DeepSpeedBF16Config) == set(TOP["bf16"]) | set(BF16_DEFAULTS)
    for name, section in (
        *(
            ("tensorboard", TensorBoardConfig),
            ("csv_monitor", CSVConfig),
            ("wandb", WandbConfig),
            ("comet", CometConfig),
        ),
        *(("compile", CompileConfig), ("comms_logger", CommsLoggerConfig)),
    ):
        assert keys(section) == set(TOP[name])
    fields = {field.alias or name: field for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for name, default in ZERO_DEFAULTS.items():
        if name not in removed and name != "leaf_module":
            assert fields[name].default == default, name
    assert typing.get_args(ZERO["stage"]) == (0, 1, 2, 3)


def test_old_names_are_printed_by_a_run(tmp_path: Path) -> None:
    """Prevents a translation that the user never hears of, and faults that are found after something was written."""
    path = written(tmp_path / "ds.json", {"bfloat16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}})
    command = [sys.executable, "-W", "ignore", "-m", "recycle_ds.pretrain", "--config", "demo", f"deepspeed={path}"]
    command += [f"run_dir={tmp_path / 'run'}", f"data.tokenizer={tmp_path / 'absent.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert f"{path}: bfloat16 is an old name: read as bf16" in done.stdout
    assert done.returncode == 2 and done.stderr.startswith("error: no such file") and not (tmp_path / "run").exists()
