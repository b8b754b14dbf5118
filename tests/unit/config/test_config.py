"""The configuration tree: accepted values, and the messages for rejected ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.config import ConfigError, load_config, load_deepspeed_json, resolve_deepspeed, save_config
from recycle_ds.config.deepspeed_json import accumulates_in_fp32, offloads, zero_stage

RUNS = Path(__file__).parents[3] / "ds_configs" / "runs"
DEEPSPEED = Path(__file__).parents[3] / "ds_configs" / "deepspeed"


def error_of(*overrides: str) -> str:
    """The error message of the demo configuration with `overrides`."""
    with pytest.raises(ConfigError) as caught:
        load_config(RUNS / "demo.yaml", overrides)
    return str(caught.value)


def of_init_from(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run takes from an init_from folder with SmolLM2-135M."""
    if "init_from" not in tree:
        return {}
    shape = {
        "layers": 30,
        "hidden": 576,
        "heads": 9,
        "kv_heads": 3,
        "ffn": 1536,
        "vocab_size": 49152,
        "max_positions": 8192,
    }
    return {"model": shape, "data": {"tokenizer": "models/smollm2/tokenizer.json"}}


def test_defaults_apply_only_to_missing_keys() -> None:
    """Prevents a default from replacing a value of a file or an override, or from replacing a complete section."""
    name = str(RUNS / "retrofit_smollm2.yaml")
    plain = load_config(name, (), of_init_from)
    assert (plain.model.layers, plain.model.max_positions) == (30, 8192) and plain.data.train[0].path.endswith("train")
    changed = load_config(name, ["model.max_positions=2048", "data.tokenizer=mine.json"], of_init_from)
    assert (changed.model.layers, changed.model.max_positions, changed.data.tokenizer) == (30, 2048, "mine.json")
    with pytest.raises(ConfigError, match="model: required, not given"):
        load_config(name)


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_runs_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a shipped configuration that its own schema rejects, or whose DeepSpeed file is missing."""
    monkeypatch.chdir(RUNS.parents[1])
    config = load_config(path, (), of_init_from)
    assert load_deepspeed_json(config.deepspeed)


def test_overrides_are_applied_in_order_and_typed() -> None:
    """Prevents 3e-4 from being read as text (YAML 1.1), and an earlier override from replacing a later one."""
    config = load_config(
        RUNS / "demo.yaml",
        ["training.learning_rate=3e-4", "training.steps=5", "training.steps=7", "data.train.0.weight=2"],
    )
    assert config.training.learning_rate == 3e-4
    assert config.training.steps == 7
    assert config.data.train[0].weight == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.stps=4", ["training.stps=4", "did you mean training.steps?"]),
        ("data.train.0.wieght=3", ["data.train.0.wieght=3", "did you mean data.train.0.weight?"]),
        ("learning_rate=3", ["did you mean training.learning_rate?"]),
        ("training.steps=abc", ["training.steps='abc'", "must be a whole number"]),
        ("training.steps=2.5", ["training.steps=2.5"]),
        ("training.steps=0", ["training.steps=0", "greater than 0"]),
        ("training.steps=true", ["training.steps", "True is not a number"]),
        ("training.decay_steps=5", ["training.decay_steps", "wsd"]),
        ("data.validation=[]", ["training.eval_every (100)", "data.validation"]),
        ("training.learning_rate=.nan", ["training.learning_rate=nan"]),
        ("model.hidden=131", ["hidden (131)", "heads (2)"]),
        ("model.kv_heads=3", ["heads (2)", "kv_heads (3)"]),
        ("training.global_batch_size=10", ["global_batch_size (10)", "micro_batch_size (4)"]),
        ("training.seq_length=4096", ["seq_length (4096)", "max_positions (512)"]),
        ("parallel.tensor=3", ["heads (2)", "tensor (3)"]),
        ("recycle.gradient=both", ["recycle.gradient='both'", "'detached'"]),
        ("run_dir=", ["run_dir", "'' is empty", "give a path"]),
        ("init_from=", ["init_from", "'' is empty"]),
        ("data.tokenizer=", ["data.tokenizer", "'' is empty"]),
        (
            "data.train=data/mine/train",
            ["data.train='data/mine/train'", "must be a list, such as [{path: data/mine/train, weight: 1}]"],
        ),
        ("data.train=[]", ["data.train=[]", "a list of at least one entry, such as [{path: PATH, weight: 1}]"]),
        ("data.train=[a]", ["data.train.0='a'", "must be a section of keys and values, such as path: VALUE"]),
        ("training=3", ["training=3", "must be a section of keys and values, such as steps: VALUE"]),
        ("training.steps=null", ["training.steps=null", "must be a whole number"]),
        ("training.tensorboard=maybe", ["training.tensorboard='maybe'", "must be true or false"]),
        ("data.prepare.validation_fraction=1", ["data.prepare.validation_fraction=1", "must be less than 1"]),
        ("training", ["expected section.key=value"]),
        ("data.train.5.weight=1", ["'5' is not an element of a list of 1"]),
        ("training.steps.x=1", ["'steps' is a value, not a section"]),
    ],
)
def test_errors_name_path_values_and_neighbour(override: str, expected: list[str]) -> None:
    """Prevents an error without the key, the value, or the nearest valid key."""
    message = error_of(override)
    assert "\n" not in message
    assert not re.search(r"tuple|dictionary|instance|validation,|None|[Ii]nput should", message), "pydantic's terms"
    for part in expected:
        assert part in message


def test_the_vocabulary_of_the_tokenizer_is_filled_in() -> None:
    """Prevents a model without rows for some of the tokenizer's tokens, and one whose padded vocabulary is cut."""
    config = load_config("demo")
    assert config.model.vocab_size is None and config.with_vocabulary(300).model.vocab_size == 300
    padded = load_config("demo", ["model.vocab_size=320"])
    assert padded.with_vocabulary(300) == padded == padded.with_vocabulary(320)
    with pytest.raises(ConfigError, match=r"model\.vocab_size \(320\) is smaller than .* vocabulary \(321\): raise it"):
        padded.with_vocabulary(321)


def test_tf32_is_for_fp32() -> None:
    """Prevents a setting without effect that a user relies on."""
    with pytest.raises(ConfigError, match=r"training\.tf32=true is for training\.dtype=fp32, not bf16"):
        load_config(RUNS / "demo.yaml", ["training.tf32=true", "training.dtype=bf16"])
    assert load_config(RUNS / "demo.yaml", ["training.tf32=true"]).training.tf32


def test_only_the_inner_error_is_reported() -> None:
    """Prevents reporting a list as too short when one of its elements has a wrong key."""
    error = error_of("data.train.0.wieght=3")
    assert "did you mean" in error and "weight" in error.split("did you mean")[1]
    assert "at least 1 item" not in error


def test_saved_config_loads_equal(tmp_path: Path) -> None:
    """Prevents a saved configuration that cannot be loaded again, or differs."""
    config = load_config(RUNS / "demo.yaml", ["recycle.depth=2"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("run_dir: a\nrun_dir: b", "given twice"),
        ("[1, 2]: a", "no name"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, part: str) -> None:
    """Prevents a traceback for a broken file, and a duplicate key of which one value is silently dropped."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_config(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def deepspeed_file(tmp_path: Path, **changes: object) -> str:
    tree = json.loads((DEEPSPEED / "zero1.json").read_text()) | changes
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"zero_optimisation": {"stage": 3}}, ["unknown key 'zero_optimisation'", "'zero_optimization'"]),
        ({"optimizer": {"type": "Lamb"}}, ["'optimizer' cannot be set here", "training.learning_rate"]),
        ({"train_batch_size": 5}, ["train_batch_size=5", "training.global_batch_size", "sets it to 8"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "training.dtype"]),
        ({"zero_optimization": {"stage": 4}}, ["stage=4"]),
        ({"zero_optimization": 3}, ["zero_optimization=3: must be an object"]),
        ({"bf16": True}, ["bf16=True: must be an object"]),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, ["zero_optimization.overlap_com", "'overlap_comm'"]),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, ["compute_grad_norm=False is not supported"]),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 0}},
            ["needs ZeRO 1, 2 or 3", "zero1.json"],
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer has no effect at ZeRO 0", "zero1_offload.json"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["offload_param has no effect at ZeRO 2", "zero3_offload.json"],
        ),
        ({"activation_checkpointing": {"profile": True}}, ["set training.activation_checkpointing"]),
    ],
)
def test_wrong_deepspeed_settings_are_rejected(tmp_path: Path, changes: dict[str, object], parts: list[str]) -> None:
    """Prevents a DeepSpeed setting that is silently ignored, or that overrides the run's configuration."""
    config = load_config(RUNS / "demo.yaml", [f"deepspeed={deepspeed_file(tmp_path, **changes)}"])
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed(config, 2)
    for part in parts:
        assert part in str(caught.value)


def test_auto_values_are_filled(tmp_path: Path) -> None:
    """Prevents an "auto" that DeepSpeed would misread, and an accumulation that does not result in the global batch."""
    config = load_config(RUNS / "demo.yaml", [f"deepspeed={deepspeed_file(tmp_path)}", "training.micro_batch_size=2"])
    tree = resolve_deepspeed(config, 2)
    assert "auto" not in json.dumps(tree)
    assert tree["gradient_accumulation_steps"] * 2 * 2 == tree["train_batch_size"] == 8
    assert tree["timers"] == {"throughput": {"enabled": False}}, "it waits for the GPU in every micro-batch"
    with pytest.raises(ConfigError, match=r"global_batch_size \(8\).*micro_batch_size \(2\).*ranks \(3\) = 6"):
        resolve_deepspeed(config, 3)


@pytest.mark.parametrize(("stage", "dtype", "pipeline", "micro_batches", "expected"), [
    (0, "bf16", 1, 99, False), (1, "bf16", 1, 8, False), (1, "bf16", 1, 9, True), (1, "bf16", 2, 1, True),
    (2, "bf16", 1, 1, True), (3, "bf16", 1, 1, True), (1, "fp32", 2, 99, False), (2, "fp32", 1, 99, False),
])  # fmt: skip
def test_many_gradients_are_accumulated_in_fp32(
    tmp_path: Path, stage: int, dtype: str, pipeline: int, micro_batches: int, expected: bool
) -> None:
    """Prevents long bf16 sums that lose small gradients, fp32 sums of few gradients, and an ignored user setting."""
    assert accumulates_in_fp32(stage, dtype, pipeline, micro_batches) is expected
    changes = [
        f"training.dtype={dtype}", f"parallel.pipeline={pipeline}", "training.micro_batch_size=1",
        f"training.global_batch_size={2 * micro_batches}",
    ]  # fmt: skip
    zero = {"stage": stage}

    def resolved(**given: object) -> object:
        path = deepspeed_file(tmp_path, zero_optimization=zero, **given)
        return resolve_deepspeed(load_config(RUNS / "demo.yaml", [f"deepspeed={path}", *changes]), 2).get("data_types")

    assert resolved() == ({"grad_accum_dtype": "fp32"} if expected else None)
    assert resolved(data_types={"grad_accum_dtype": "bf16"}) == {"grad_accum_dtype": "bf16"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_offload_files_offload(stage: int) -> None:
    """Prevents an offload file that does not offload, and device "none" from counting as offload."""
    tree = load_deepspeed_json(str(DEEPSPEED / f"zero{stage}_offload.json"))
    assert zero_stage(tree) == stage and offloads(tree, "offload_optimizer")
    assert not offloads(
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}}, "offload_optimizer"
    )
    assert not offloads({}, "offload_param")


def test_merge_keys_of_yaml(tmp_path: Path) -> None:
    """Prevents `<<: *defaults`, which shares settings, from being read as a key of that name or as a duplicate key."""
    text = (RUNS / "demo.yaml").read_text().replace("training:\n", "training:\n  <<: {log_every: 7, steps: 9}\n")
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml")
    assert config.training.log_every == 7 and config.training.steps == load_config(RUNS / "demo.yaml").training.steps
