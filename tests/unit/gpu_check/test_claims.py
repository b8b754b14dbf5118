"""Verdicts on claims from figures, and the report that shows them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recycle_ds.gpu_check.claims import BORNE_OUT, NOT_MEASURED, PROVEN, SHORT, compare_with_before, judge_all
from recycle_ds.gpu_check.part import FAILED, PASSED, Checked, Result
from recycle_ds.gpu_check.parts import CheckSettings
from recycle_ds.gpu_check.report import Report, as_markdown
from recycle_ds.gpu_check.time_by_kind import OTHER, kind_of, milliseconds_by_kind


def figures(speed: float = 2.0, random: bool = False) -> dict[str, dict[str, Any]]:
    """Figures of all benches. speed: training's factor over Hugging Face, and verified's over autoregressive."""
    subject = {"share_of_matmul_rate": 0.4, "peak_gib": 25.0, "tokens_per_second": 200_000.0}
    return {
        "machine": {"memory_bandwidth": 3e12},
        "training": {
            "subjects": {"backbone": subject, "recycle": subject, "huggingface": subject},
            "ratios": {"speed_over_huggingface": speed, "module_time_over_flops": 1.01, "module_time": 1.2},
            "planner_backbone": {"ratio": 0.9}, "planner_recycle": {"ratio": 1.3},
        },
        "training_large": {"share_of_matmul_rate": 0.44},
        "decoding": {
            "random_weights": random, "weight_bytes": 3e8,
            "modes": {"autoregressive": {"tokens_per_second": 1000.0}, "verified": {"speedup": speed}},
            "peers": {"transformers": {"tokens_per_second": 50.0}},
        },
        "serving": {
            "batches": {
                str(n): {"autoregressive": {"tokens_per_second": 900.0 * n**0.9, "tokens_per_full_call": 1.0},
                         "verified": {"tokens_per_second": 990.0 * n**0.9, "tokens_per_full_call": 1.5}}
                for n in (1, 4, 16, 64)
            }
        },
    }  # fmt: skip


def results(found: dict[str, dict[str, Any]]) -> dict[str, Result]:
    return {f"bench_{name}": Result(f"bench_{name}", PASSED, figures=one) for name, one in found.items()}


def verdicts(entries: list[dict[str, Any]], word: str) -> list[str]:
    return [one["verdict"] for one in entries if word in one["claim"]]


def test_figures_decide_what_is_borne_out() -> None:
    """Prevents a bound that is read the wrong way round, and a verdict on another figure than the claim's."""
    entries = judge_all(results(figures()), rehearsal=False)
    assert verdicts(entries, "1.8 times") == [BORNE_OUT]
    assert verdicts(entries, "1.3 B") == [SHORT]
    assert verdicts(entries, "peak memory") == [BORNE_OUT, BORNE_OUT]
    assert verdicts(entries, "8 times transformers") == [BORNE_OUT]
    assert verdicts(entries, "batch 64 at least 30") == [BORNE_OUT]
    assert verdicts(entries, "1.6 times") == [BORNE_OUT]
    assert verdicts(entries, "every batch up to 64") == [BORNE_OUT]
    assert verdicts(entries, "planner") == [BORNE_OUT, SHORT]
    (floor,) = [one for one in entries if "only read" in one["claim"]]
    assert (floor["measured"], floor["verdict"]) == ("10%", NOT_MEASURED)
    slow = judge_all(results(figures(speed=1.3)), rehearsal=False)
    assert verdicts(slow, "1.8 times") == verdicts(slow, "1.6 times") == [SHORT]


def test_nothing_is_borne_out_without_figures() -> None:
    """Prevents verdicts from missing figures, from random weights where drafts count, and from a CPU."""
    assert {one["verdict"] for one in judge_all({}, rehearsal=False)} == {NOT_MEASURED}
    assert {one["verdict"] for one in judge_all(results(figures()), rehearsal=True)} == {NOT_MEASURED}
    random = judge_all(results(figures(random=True)), rehearsal=False)
    assert verdicts(random, "1.6 times") == verdicts(random, "every batch up to 64") == [NOT_MEASURED]
    assert verdicts(random, "8 times transformers") == [BORNE_OUT]
    short = figures()
    del short["serving"]["batches"]["64"]
    entries = judge_all(results(short), rehearsal=False)
    assert verdicts(entries, "every batch up to 64") == verdicts(entries, "batch 64 at least") == [NOT_MEASURED]


def test_tests_decide_what_is_proven() -> None:
    """Prevents a claim that counts as proven although one of its tests failed or never ran."""
    good, bad = Checked("test_a", PASSED), Checked("test_b", FAILED)
    found = {"zero": Result("zero", PASSED, tests=(good,)), "engine": Result("engine", FAILED, tests=(good, bad))}
    entries = {one["wanted"]: one for one in judge_all(found, rehearsal=False)[: len(PROVEN)]}
    assert entries["tests/gpu/test_zero.py"]["verdict"] == BORNE_OUT
    assert entries["tests/gpu/test_engine.py"] | {"claim": ""} == {
        "claim": "", "wanted": "tests/gpu/test_engine.py", "measured": "1 of 2 tests", "verdict": SHORT,
    }  # fmt: skip
    assert entries["tests/gpu/test_sampling.py"]["verdict"] == NOT_MEASURED


def test_figures_are_beside_those_of_the_earlier_run() -> None:
    """Prevents a comparison with another figure than the one that is named."""
    before = compare_with_before(results(figures()))
    rows = {row["figure"]: row for row in before["figures"]}
    assert rows["training, backbone over Hugging Face"] == {
        "figure": "training, backbone over Hugging Face", "then": 1.3, "now": 2.0,
    }  # fmt: skip
    assert rows["training, backbone, tokens/s"]["now"] == 200_000.0
    assert rows["module, FLOPs over the backbone's"]["now"] is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_report_names_the_card_and_the_model(tmp_path: Path, device: str) -> None:
    """Prevents a report that cannot be told from that of another card, of other weights or of a rehearsal."""
    settings = CheckSettings(tmp_path, device=device)
    report = Report(settings, {"name": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}, [*results(figures()), "zero"])
    for result in results(figures()).values():
        report.add(result)
    report.write(12.0, complete=True)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Check on NVIDIA H100 80GB HBM3\n") and "torch 2.11.0" in text
    assert "random weights of SmolLM2-135M's shape" in text
    assert ("A rehearsal on a CPU" in text) == (device == "cpu") == ("borne out |" not in text)
    assert "| zero | not run | - | 0 | 0 |" in text and "## Beside an earlier run on one NVIDIA H100" in text
    assert "| 64 | verified |" in text
    tree = report._tree(1.0, False)
    assert "**not complete**" in as_markdown(tree)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("nvjet_tst_128x256", "matrix products"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_tem_fused_mm_1", "matrix products"),
        ("triton_poi_fused_mul_silu_3", "fused by the compiler"),
        ("triton_red_fused__fused_rms_norm__to_copy_add_0", "fused by the compiler"),
        ("triton_red_fused__log_softmax_0", "fused by the compiler"),
        ("triton_per_fused__flex_attention_backward_0", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam>", "optimizer and norms of gradients"),
        ("void at::native::direct_copy_kernel_cuda", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<MulFunctor>", OTHER),
        ("aten::addmm", "matrix products"),
    ],
)
def test_kernels_are_sorted_into_kinds(kernel: str, kind: str) -> None:
    """Prevents a table of a step's time that counts attention as something else."""
    assert kind_of(kernel) == kind


def test_annotations_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a table of a step's time that counts kernels twice: an annotation, such as the optimizer's, has theirs too."""

    class Profile:
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def key_averages(self) -> list[SimpleNamespace]:
            cpu = torch.autograd.DeviceType.CPU
            return [
                SimpleNamespace(
                    device_type=cpu, self_cpu_time_total=spent, key=key, is_user_annotation=key[0].isupper()
                )
                for key, spent in (("aten::mm", 3000.0), ("Optimizer.step#AdamW.step", 5000.0))
            ]

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profile())
    assert milliseconds_by_kind(lambda: None, torch.device("cpu")) == {"matrix products": 3.0}
