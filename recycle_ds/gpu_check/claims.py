"""What the documents say of GPUs, and what a check found: each claim is borne out, fallen short of, or not measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from recycle_ds.gpu_check.part import PASSED, Result
from recycle_ds.gpu_check.parts import BENCH

BORNE_OUT, SHORT, NOT_MEASURED = "borne out", "falls short", "not measured"

Figures = Mapping[str, Mapping[str, Any]]
"""By bench."""


class _NotThere(Exception):
    """A figure that was not measured."""


@dataclass(frozen=True)
class Claim:
    """A figure and its bound. trained: whether random weights say nothing about it."""

    text: str
    value: Callable[[Figures], float]
    least: float | None = None
    most: float | None = None
    trained: bool = False
    shown: str = "{:.2f}"


def at(figures: Figures, bench: str, path: str) -> Any:
    """A bench's figure by its dotted path. Raises _NotThere."""
    found: Any = figures.get(bench, {})
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            raise _NotThere(f"{bench}: {path}")
        found = found[key]
    return found


def _path(bench: str, path: str) -> Callable[[Figures], float]:
    return lambda figures: float(at(figures, bench, path))


def _speed(figures: Figures, batch: str, mode: str) -> float:
    return float(at(figures, "serving", f"batches.{batch}.{mode}.tokens_per_second"))


def _over_transformers(figures: Figures) -> float:
    own = at(figures, "decoding", "modes.autoregressive.tokens_per_second")
    return float(own / at(figures, "decoding", "peers.transformers.tokens_per_second"))


def _share_of_floor(figures: Figures) -> float:
    """Tokens per second over those at which the weights alone are read at the measured bandwidth."""
    speed, size = (
        at(figures, "decoding", "modes.autoregressive.tokens_per_second"),
        at(figures, "decoding", "weight_bytes"),
    )
    return float(speed * size / at(figures, "machine", "memory_bandwidth"))


def _worst_verified(figures: Figures) -> float:
    batches = [int(batch) for batch in at(figures, "serving", "batches")]
    if max(batches) < 64:
        raise _NotThere("serving: batch 64")
    return min(_speed(figures, str(n), "verified") / _speed(figures, str(n), "autoregressive") for n in batches)


def _planner_error(subject: str) -> Callable[[Figures], float]:
    return lambda figures: abs(float(at(figures, "training", f"planner_{subject}.ratio")) - 1)


_SHAPE = "135 M shape, 16 x 2048 tokens, bf16"
CLAIMS = (
    Claim(
        f"{_SHAPE}: at least 1.8 times the speed of Hugging Face's model under the same engine",
        _path("training", "ratios.speed_over_huggingface"),
        least=1.8,
    ),
    Claim(
        f"{_SHAPE}: the backbone at 35 % of the rate of matrix products or more",
        _path("training", "subjects.backbone.share_of_matmul_rate"),
        least=0.35,
        shown="{:.0%}",
    ),
    Claim(
        f"{_SHAPE}: the time of a one-layer module is at most 1.05 times its share of the FLOPs",
        _path("training", "ratios.module_time_over_flops"),
        most=1.05,
        shown="{:.3f}",
    ),
    Claim(
        f"{_SHAPE}: peak memory of the backbone at most 25.5 GiB",
        _path("training", "subjects.backbone.peak_gib"),
        most=25.5,
    ),
    Claim(
        f"{_SHAPE}: peak memory with the module at most 26.4 GiB",
        _path("training", "subjects.recycle.peak_gib"),
        most=26.4,
    ),
    Claim(
        f"{_SHAPE}: a checkpoint costs training at most a tenth of a step",
        _path("training", "save.share_of_step"),
        most=0.1,
    ),
    Claim(
        "1.3 B shape with its module, bf16: 45 % of the rate of matrix products or more",
        _path("training_large", "share_of_matmul_rate"),
        least=0.45,
        shown="{:.0%}",
    ),
    Claim(
        "one stream of the 135 M shape, bf16: autoregressive at least 8 times transformers' generate",
        _over_transformers,
        least=8.0,
    ),
    Claim(
        "one stream: autoregressive, as a share of the speed at which the weights are only read (no bound)",
        _share_of_floor,
        shown="{:.0%}",
    ),
    Claim(
        "one stream: autoregressive with the next step started while this one is computed, over without (no bound)",
        _path("decoding", "looking_ahead.speedup"),
    ),
    Claim(
        "one stream of SmolLM2-135M, bf16: verified at least 1.6 times autoregressive",
        _path("decoding", "modes.verified.speedup"),
        least=1.6,
        trained=True,
    ),
    Claim(
        "autoregressive at batch 64 at least 30 times batch 1",
        lambda figures: _speed(figures, "64", "autoregressive") / _speed(figures, "1", "autoregressive"),
        least=30.0,
    ),
    Claim(
        "verified at least as fast as autoregressive at every batch up to 64 (the smallest factor)",
        _worst_verified,
        least=1.0,
        trained=True,
    ),
    *(
        Claim(
            f"planner: step time of the {_SHAPE} ({subject}) within 15 %",
            _planner_error(subject),
            most=0.15,
            shown="off by {:.0%}",
        )
        for subject in ("backbone", "recycle")
    ),
    *(
        Claim(
            f"{text}, forward and backward: liger-kernel's time over that of what the compiler makes (no bound)",
            _path("kernels", f"{name}.liger_over_ours"),
        )
        for name, text in (
            ("norm", "RMSNorm"),
            ("swiglu", "SwiGLU"),
            ("rotary", "rotary embedding"),
            ("head_loss", "head and cross entropy"),
        )
    ),
)
PROVEN = {
    "zero": "fp32 losses and gradient norms are those of a CPU, and equal under ZeRO 1, 2 and 3",
    "memory_savers": "offload and activation checkpointing change no loss; a resumed run continues exactly; bf16 follows fp32",
    "attention": "FlexAttention equals dense attention, forward and backward, and is compiled for every variant",
    "compiled": "a compiled run has the losses of an eager one",
    "decoding": "verified is autoregressive token for token, in fp32 also the CPU's; alternate keeps what it drafts",
    "sampling": "sampled texts have the model's distribution; with a seed they are the CPU's",
    "engine": "no answer depends on the batch or on preemption",
    "decoding_graphs": "decoding in CUDA graphs gives the tokens of eager decoding",
}
"""Claims that tests of a part prove, by the part's name. A part that is not here stands for itself."""


def figures_of(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """The figures of the benches that have any, by bench."""
    return {name.removeprefix(BENCH): one.figures for name, one in results.items() if one.figures}


def judge_all(results: Mapping[str, Result], *, rehearsal: bool) -> list[dict[str, Any]]:
    """For report.json: every claim with `wanted`, `measured` and `verdict`."""
    found = [_judge_tests(name, text, results.get(name), rehearsal) for name, text in PROVEN.items()]
    figures = figures_of(results)
    return found + [_judge(claim, figures, rehearsal) for claim in CLAIMS]


def _judge_tests(name: str, text: str, result: Result | None, rehearsal: bool) -> dict[str, Any]:
    entry = {"claim": text, "wanted": f"tests/gpu/test_{name}.py", "measured": "-", "verdict": NOT_MEASURED}
    if result is None or not result.tests:
        return entry
    passed = sum(test.state == PASSED for test in result.tests)
    entry["measured"] = f"{passed} of {len(result.tests)} tests" + (" on a CPU" if rehearsal else "")
    if not rehearsal:
        entry["verdict"] = BORNE_OUT if result.state == PASSED else SHORT
    return entry


def _judge(claim: Claim, figures: Figures, rehearsal: bool) -> dict[str, Any]:
    wanted = "-"
    if claim.least is not None:
        wanted = f"at least {claim.least:g}"
    elif claim.most is not None:
        wanted = f"at most {claim.most:g}"
    entry = {"claim": claim.text, "wanted": wanted, "measured": "-", "verdict": NOT_MEASURED}
    try:
        value = claim.value(figures)
    except (_NotThere, ZeroDivisionError):
        return entry
    entry["measured"] = claim.shown.format(value)
    if rehearsal:
        entry["measured"] += " (rehearsal)"
    elif claim.trained and any(figures.get(bench, {}).get("random_weights") for bench in ("decoding", "serving")):
        entry["measured"] += " (random weights)"
    elif claim.least is not None or claim.most is not None:
        good = (claim.least is None or value >= claim.least) and (claim.most is None or value <= claim.most)
        entry["verdict"] = BORNE_OUT if good else SHORT
    return entry


def compare_with_before(results: Mapping[str, Result]) -> dict[str, Any]:
    """The figures of an earlier run on a GPU beside those of this one: card, source, and `then` and `now` by figure."""
    before = json.loads(files("recycle_ds.gpu_check").joinpath("figures_h100.json").read_text(encoding="utf-8"))
    figures = figures_of(results)
    rows = []
    for one in before["figures"]:
        try:
            now: float | None = float(at(figures, one["bench"], one["path"]))
        except _NotThere:
            now = None
        rows.append({"figure": one["name"], "then": one["value"], "now": now})
    return {"card": before["card"], "source": before["source"], "figures": rows}
