"""The planner's results: layouts that fit and their order, and rejected layouts with the reasons."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.config import ConfigError, RunConfig
from recycle_ds.model.flops import parameters
from recycle_ds.model.stages import partition
from recycle_ds.parallel.layout import Layout
from recycle_ds.planning import command
from recycle_ds.planning.activations import CPU, CUDA
from recycle_ds.planning.candidates import Candidate
from recycle_ds.planning.communication import communication
from recycle_ds.planning.hardware import Cluster, find_gpu
from recycle_ds.planning.memory import GIB, activations_of, local_weights, stage_memory, worst_stage
from recycle_ds.planning.plan import USABLE, Plans, make_plans
from tests.runs import ROOT

FIELDS = {"tensor", "pipeline", "data", "zero_stage", "micro_batch_size", "recompute", "offload", "memory_gib",
          "step_seconds", "tokens_per_second", "mfu"}  # fmt: skip


@lru_cache
def preset(name: str) -> RunConfig:
    return command.read_run(str(ROOT / "ds_configs" / "runs" / f"{name}.yaml"), [])


@lru_cache
def plans(name: str = "7b", nodes: int = 2, gpu: str = "h100", offload: bool = True) -> Plans:
    return make_plans(preset(name), Cluster(nodes, 8, find_gpu(gpu)), offload=offload)


def candidate(**change: Any) -> Candidate:
    base = Candidate(Layout(data=8), 1, 1, "none", False, False)
    return replace(base, **change)


def test_report_has_the_agreed_fields() -> None:
    """Prevents missing keys that scripts read, and a layout that is listed as fitting but is too large."""
    report = json.loads(json.dumps(command.report(plans())))
    assert report["parameters"] == parameters(preset("7b").model, preset("7b").recycle)
    assert report["layouts"] and report["rejected"]
    for layout in report["layouts"]:
        assert layout.keys() >= FIELDS
        held = layout["memory_gib"]
        assert held["total"] == pytest.approx(sum(value for name, value in held.items() if name != "total"))
        assert held["total"] <= USABLE * 80
        assert layout["tensor"] * layout["pipeline"] * layout["data"] == 16
        assert 0 < layout["mfu"] < 1 and layout["step_seconds"] > 0
    assert all(entry["reason"] for entry in report["rejected"])


def test_fastest_first() -> None:
    """Prevents a ranking that puts a slow layout first."""
    rates = [plan.tokens_per_second for plan in plans().fitting]
    assert rates == sorted(rates, reverse=True)


def test_impossible_layouts_are_not_offered() -> None:
    """Prevents a plan that pretraining would refuse at start-up."""
    for plan in plans("70b", 16).fitting:
        layout = plan.candidate.layout
        assert layout.pipeline == 1 or (plan.candidate.zero_stage < 2 and not plan.candidate.offload)
        assert 8 % layout.tensor == 0, "70 B has eight key/value heads, and a node eight GPUs"
        assert 1024 % (layout.data * plan.candidate.micro_batch_size) == 0
    reasons = {rejection.reason for rejection in plans("70b", 16).rejected}
    assert any("ZeRO 2 does not work with a pipeline" in reason for reason in reasons)
    assert any("offload_optimizer does not work with a pipeline" in reason for reason in reasons)
    assert any("needs" in reason and "GiB" in reason for reason in reasons)


def test_one_replica_may_offload() -> None:
    """Prevents the rejection of ZeRO 2 and 3 with offload on one GPU, the only layouts in which some models fit."""
    alone = make_plans(preset("recyclegpt_1.3b"), Cluster(1, 1, find_gpu("h100")))
    offered = {(plan.candidate.zero_stage, plan.candidate.offload) for plan in alone.fitting}
    assert {(2, True), (3, True)} <= offered
    assert not {(2, False), (3, False)} & offered
    reasons = {rejection.reason for rejection in alone.rejected}
    assert "ZeRO has nothing to partition at data 1" in reasons


def with_file(folder: Path, zero: dict[str, Any], **more: Any) -> RunConfig:
    """The 7b preset with its own DeepSpeed file."""
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1} | zero} | more))
    return preset("7b").model_copy(update={"deepspeed": str(path)})


def test_the_runs_deepspeed_file_is_used(tmp_path: Path) -> None:
    """Prevents a plan with DeepSpeed's default bucket sizes although the run sets other sizes."""
    plain = preset("7b")

    def buffers(stage: int, **zero: Any) -> float:
        return stage_memory(with_file(tmp_path, zero), candidate(zero_stage=stage), 0).buffers

    for stage in (2, 3):
        usual = stage_memory(plain, candidate(zero_stage=stage), 0).buffers
        assert usual - buffers(stage, reduce_bucket_size=1e8) == pytest.approx(2 * 4e8)
    assert buffers(2, overlap_comm=True) - buffers(2) == pytest.approx(2 * 5e8)
    assert buffers(3, overlap_comm=True) == buffers(3)
    assert buffers(2, allgather_bucket_size=1e6) == buffers(2), "weights are gathered in place"
    assert buffers(3) - buffers(3, stage3_max_live_parameters=1e8) == pytest.approx(2 * 9e8)
    near = {"stage3_max_reuse_distance": 0}
    assert buffers(3, stage3_prefetch_bucket_size=3e8, **near) - buffers(3, **near) == pytest.approx(2 * 2.5e8)
    assert buffers(2, stage3_max_live_parameters=1e8) == buffers(2)
    with pytest.raises(ConfigError, match=r"reduce_bucket_size='many': must be a whole number"):
        buffers(2, reduce_bucket_size="many")
    with pytest.raises(ConfigError, match=r"deepspeed='nowhere.json': no such file"):
        stage_memory(plain.model_copy(update={"deepspeed": "nowhere.json"}), candidate(), 0)


def test_sums_in_fp32_are_those_of_training(tmp_path: Path) -> None:
    """Prevents a plan that omits, or wrongly counts, the four bytes per weight of gradients accumulated in fp32."""
    plain, bf16 = preset("7b"), with_file(tmp_path, {}, data_types={"grad_accum_dtype": "bf16"})
    weights = local_weights(plain.model, plain.recycle, 1, 32, (True, True)).total
    per_rank = plain.training.global_batch_size // 8
    for micro, sums in ((1, True), (per_rank // 8, False)):  # 8 micro-batches are accumulated in bf16
        one = candidate(micro_batch_size=micro)
        assert stage_memory(plain, one, 0).gradients == pytest.approx((6 if sums else 2) * weights)
        sent = communication(plain, one, 32, local_weights(plain.model, plain.recycle, 1, 32, (True, True)), last=True)
        assert sent.gradients == pytest.approx((4 if sums else 2) * weights * 7 / 8 * 2)
        assert stage_memory(bf16, one, 0).gradients == pytest.approx(2 * weights)
    two = candidate(zero_stage=2)
    assert stage_memory(plain, two, 0).gradients == 2 * stage_memory(bf16, two, 0).gradients
    staged = candidate(layout=Layout(pipeline=2, data=4), micro_batch_size=plain.training.global_batch_size // 8)
    assert stage_memory(plain, staged, 0).gradients == 3 * stage_memory(bf16, staged, 0).gradients


def test_no_offload_offers_none() -> None:
    """Prevents --no-offload from being ignored."""
    assert any(plan.candidate.offload for plan in plans().fitting)
    assert not any(plan.candidate.offload for plan in plans(offload=False).fitting)


def test_offloaded_state_leaves_the_device() -> None:
    """Prevents offloaded state from being counted as GPU memory, or from not being counted."""
    config = preset("7b")
    for stage in (1, 2, 3):
        on, off = (stage_memory(config, candidate(zero_stage=stage, offload=flag), 0) for flag in (False, True))
        assert off.total < on.total and off.host > 0 == on.host
        assert off.states + off.host == pytest.approx(on.states)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_partitions_add_up(stage: int) -> None:
    """Prevents optimizer state that is not inversely proportional to the number of replicas that share it."""
    config = preset("7b")
    one, many = (
        stage_memory(config, candidate(layout=Layout(data=size), zero_stage=stage), 0).optimizer for size in (1, 64)
    )
    assert many * 64 == pytest.approx(one)


@pytest.mark.parametrize("name", ["recyclegpt_1.3b", "7b", "70b"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 4), (8, 8)])
def test_weights_of_all_ranks_make_the_model(name: str, tensor: int, pipeline: int) -> None:
    """Prevents blocks, heads or embeddings that are counted twice or never (except for copies and padding)."""
    config = preset(name)
    model, recycle = config.model, config.recycle
    counts = [len(part) for part in partition(model, recycle, config.training.seq_length, pipeline)]
    total = 0
    for number, blocks in enumerate(counts):
        ends = (number == 0, number == pipeline - 1)
        found = local_weights(model, recycle, tensor, blocks, ends)
        total += tensor * found.large + found.small
    assert model.vocab_size is not None
    unit = model.vocab_multiple * tensor
    padding = (-model.vocab_size % unit) * model.hidden * (1 if model.tied_embeddings else 2)
    copy = (model.vocab_size + -model.vocab_size % unit) * model.hidden if pipeline > 1 else 0
    assert total - padding - copy == parameters(model, recycle)


def test_settings_that_save_memory_do_so_in_the_plan() -> None:
    """Prevents a formula with a wrong sign or an inverted degree."""
    config = preset("7b")
    plain = stage_memory(config, candidate(), 0)
    assert stage_memory(config, candidate(recompute="full"), 0).activations < plain.activations / 4
    one, two = (activations_of(config, candidate(micro_batch_size=size)) for size in (1, 2))
    assert two.block() == 2 * one.block() and two.head_gradient(2) == one.head_gradient(2)
    split = candidate(layout=Layout(tensor=4, data=2))
    sequence = replace(split, sequence=True)
    activations = [stage_memory(config, one, 0).activations for one in (candidate(), split, sequence)]
    assert activations[0] > activations[1] > activations[2]
    first, last = (stage_memory(config, candidate(layout=Layout(pipeline=4, data=2)), stage) for stage in (0, 3))
    assert first.activations > last.activations, "four micro-batches are in flight on the first stage, one on the last"
    assert worst_stage(config, candidate(layout=Layout(pipeline=4, data=2)))[1].total >= max(first.total, last.total)


def test_fused_kernels_keep_less() -> None:
    """Prevents the CPU kernels' fp32 copies and masks from being counted on a GPU, or the reverse."""
    config = preset("7b")
    assert activations_of(config, candidate(), CUDA).block() < activations_of(config, candidate(), CPU).block()


def test_traffic_by_kind() -> None:
    """Prevents traffic from being counted for an axis with one rank, or not counted for an axis with several."""
    config = preset("7b")
    weights = local_weights(config.model, config.recycle, 1, 32, (True, True))
    alone = communication(config, candidate(layout=Layout()), 32, weights, last=True)
    assert alone.total == 0
    data = communication(config, candidate(zero_stage=3), 32, weights, last=True)
    assert data.tensor == data.pipeline == 0 < data.gradients and data.weights > 0
    tensor = communication(config, candidate(layout=Layout(tensor=8), sequence=True), 32, weights, last=True)
    assert tensor.gradients == tensor.pipeline == 0 < tensor.tensor
    stages = communication(config, candidate(layout=Layout(pipeline=8)), 4, weights, last=False)
    assert stages.tensor == stages.gradients == 0 < stages.pipeline
    # forward and backward of queries, keys, values and output: 7/8 of the elements of an eighth of the sequence
    exchanged = communication(config, candidate(layout=Layout(ulysses=8)), 32, weights, last=True)
    micro_batches = config.training.global_batch_size
    width = 2 * (config.model.heads + config.model.kv_heads) * config.model.dim_per_head
    passes = 32 + config.recycle.layers * config.recycle.depth
    own = config.training.seq_length // 8
    assert exchanged.ulysses == pytest.approx(7 / 8 * 2 * passes * own * width * 2 * micro_batches)
    assert exchanged.tensor == exchanged.pipeline == 0 < exchanged.gradients


def test_ulysses_is_offered_for_long_sequences() -> None:
    """Prevents a missing plan for a sequence that fits no single rank, and a Ulysses plan that was not requested."""
    cluster = Cluster(2, 8, find_gpu("h100"))
    long = preset("7b").model_copy(
        update={
            "model": preset("7b").model.model_copy(update={"max_positions": 262_144}),
            "training": preset("7b").training.model_copy(update={"seq_length": 262_144, "global_batch_size": 16}),
        }
    )
    offered = make_plans(long, cluster, ulysses=True)
    layouts = [plan.candidate.layout for plan in offered.fitting]
    assert any(layout.ulysses == 16 and layout.data == 1 for layout in layouts)
    assert all(layout.tensor * layout.pipeline * layout.replicas == 16 for layout in layouts)
    whole, split = (
        stage_memory(long, candidate(layout=Layout(data=16 // degree, ulysses=degree), zero_stage=3), 0)
        for degree in (1, 16)
    )
    assert split.activations < whole.activations / 10 and split.states == whole.states
    assert not any(plan.candidate.layout.ulysses > 1 for plan in plans().fitting)
    odd = make_plans(preset("recyclegpt_1.3b"), Cluster(3, 1, find_gpu("h100")), ulysses=True)
    assert any("is not divisible by ulysses 3" in rejection.reason for rejection in odd.rejected)


def test_no_fitting_layout_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents exit code 0 and an empty table for a model that fits in no layout."""
    cluster = Cluster(1, 1, find_gpu("l40s"))
    code = command.run(preset("70b"), cluster, offload=False, as_json=True, top=5, verify=False)
    printed = capsys.readouterr()
    assert code == 1
    assert json.loads(printed.out)["layouts"] == []
    assert "error: nothing fits: the smallest layout needs" in printed.err


def test_memory_is_in_gib() -> None:
    """Prevents gigabytes that are labelled as GiB."""
    memory = stage_memory(preset("7b"), candidate(), 0)
    plan = next(plan for plan in plans().fitting)
    assert plan.report()["memory_gib"]["weights"] == plan.memory.weights / GIB  # type: ignore[index]
    assert memory.weights == pytest.approx(2 * parameters(preset("7b").model, preset("7b").recycle), rel=0.01)
