"""Predicted step times, compared with what was measured."""

from __future__ import annotations

from functools import lru_cache

import pytest

from recycle_ds.config import RecycleConfig, RunConfig
from recycle_ds.planning import command
from recycle_ds.planning.errors import PlanningError
from recycle_ds.planning.kernels import COMPILED, EAGER, FLASH, GPU_MEASURED, HUGGING_FACE, MEASURED, Measurement
from recycle_ds.planning.prediction import gpu_of, predict
from tests.runs import ROOT

TOLERANCE = 0.15


@lru_cache
def measured_run(*overrides: str) -> RunConfig:
    """The run that was measured: the 135 M shape, 16 x 2048 tokens."""
    settings = [
        "training.micro_batch_size=16", "training.global_batch_size=16", "training.seq_length=2048",
        "model.max_positions=2048", "training.loss_chunk=8192", f"deepspeed={ROOT}/ds_configs/deepspeed/zero1.json",
    ]  # fmt: skip
    return command.read_run(str(ROOT / "ds_configs/runs/bench_135m.yaml"), [*settings, *overrides])


def plain(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"recycle": RecycleConfig(layers=0)})


@pytest.mark.parametrize("measurement", MEASURED, ids=lambda one: one.subject)
def test_measured_steps_are_predicted(measurement: Measurement) -> None:
    """Prevents an estimate that is off by more than 15 % where there is a measurement: backbone, module, Hugging Face."""
    config = measured_run()
    run = config if measurement.subject == "recycle" else plain(config)
    found = predict(run, GPU_MEASURED, kernels=measurement.kernels)
    assert abs(found.deviation(measurement.tokens_per_second)) < TOLERANCE, found


def test_parts_of_the_measured_step() -> None:
    """Prevents a right total of wrong parts: of 171 ms, products took 40, attention 40, memory-bound kernels some 90."""
    time = predict(plain(measured_run()), GPU_MEASURED, kernels=EAGER).time
    assert time.products == pytest.approx(0.040, rel=TOLERANCE)
    assert time.attention == pytest.approx(0.040, rel=TOLERANCE)
    assert time.elementwise + time.optimizer == pytest.approx(0.090, rel=TOLERANCE)


def test_what_compilation_should_bring() -> None:
    """Prevents an estimate of the compiled step that contradicts its own passes over memory, or that claims to be measured."""
    config = plain(measured_run())
    eager, compiled = (predict(config, "NVIDIA H100 80GB HBM3", kernels=kernels) for kernels in (EAGER, COMPILED))
    assert not compiled.kernels.measured and eager.kernels.measured
    assert compiled.time.products == eager.time.products
    assert compiled.time.elementwise < eager.time.elementwise / 2.5
    single = predict(config, "h100", single_documents=True)
    assert single.kernels.attention == FLASH and single.time.attention < compiled.time.attention
    assert predict(config, "h100").kernels == COMPILED, "training.compile=auto compiles on a GPU"
    off = config.model_copy(update={"training": config.training.model_copy(update={"compile": False})})
    assert predict(off, "h100").kernels == EAGER
    assert predict(off, "h100").deviation(eager.tokens_per_second * 1.1) == pytest.approx(0.1)


def test_faster_memory_makes_a_faster_step() -> None:
    """Prevents memory-bound terms that ignore the GPU's bandwidth: the H200 differs from the H100 in that alone."""
    config = measured_run()
    slow, fast = predict(config, "h100").time, predict(config, "NVIDIA H200").time
    assert fast.products == slow.products
    assert fast.elementwise == pytest.approx(slow.elementwise * 3.35 / 4.8)
    more = predict(measured_run("training.activation_checkpointing=full"), "h100").time
    assert more.elementwise > slow.elementwise and more.products > slow.products


def test_names_of_gpus() -> None:
    """Prevents rates of another card of the same family, and a prediction for a card whose rates nobody knows."""
    names = {
        "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA L40S": "l40s",
        "NVIDIA H100 PCIe": "h100", "b200": "b200",
    }  # fmt: skip
    assert {name: gpu_of(name).name for name in names} == names
    with pytest.raises(PlanningError, match=r"'GeForce 256': no rates of this GPU are known; known are a100-40"):
        gpu_of("GeForce 256")


def test_hugging_face_has_no_module() -> None:
    """Prevents a module's time in the prediction of a model without one."""
    config = measured_run()
    assert predict(config, "h100", kernels=HUGGING_FACE) == predict(plain(config), "h100", kernels=HUGGING_FACE)
