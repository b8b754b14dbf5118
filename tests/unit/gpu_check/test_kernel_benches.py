"""The functions of a block beside another library's, at a size for a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.config import ModelConfig
from recycle_ds.gpu_check.kernel_benches import Case, cases, kernels, measured

SHAPE = ModelConfig(layers=1, hidden=12, heads=3, kv_heads=1, ffn=20, vocab_size=30, max_positions=64)
NAMES = {"norm", "swiglu", "rotary", "head_loss"}


class Other:
    """liger-kernel's functions, by their definition and in its layouts. wrong: the name of one that is not."""

    def __init__(self, wrong: str = "") -> None:
        self._factor = {name: 1.01 if name == wrong else 1.0 for name in NAMES}

    def liger_rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, offset: float, casting: str, in_place: bool
    ) -> Tensor:
        assert (offset, casting, in_place) == (0.0, "llama", False)
        return self._factor["norm"] * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight

    def liger_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        assert gate.is_contiguous() and up.is_contiguous()
        return self._factor["swiglu"] * F.silu(gate) * up

    def liger_rope(self, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        assert query.shape == (2, 3, 8, 4) and key.shape == (2, 1, 8, 4) and cosine.shape == (1, 8, 4)

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cosine[:, None] + self._factor["rotary"] * torch.cat((-second, first), dim=-1) * sine[:, None]

        return turn(query), turn(key)

    def liger_fused_linear_cross_entropy(
        self, states: Tensor, head: Tensor, targets: Tensor, accum_dtype: torch.dtype
    ) -> Tensor:
        assert accum_dtype == torch.float32
        return self._factor["head_loss"] * F.cross_entropy(states @ head.t(), targets)


def _cases(other: Any) -> dict[str, Case]:
    return dict(cases(SHAPE, 16, 2, torch.float32, torch.device("cpu"), lambda function: function, other))


@pytest.mark.parametrize("wrong", ["", *sorted(NAMES)])
def test_both_libraries_compute_the_same(wrong: str) -> None:
    """Prevents a ratio of the times of two different functions, inputs in another layout or order, and gradients that are not
    compared."""
    for name, case in _cases(Other(wrong)).items():
        found = measured(case, 2)
        if name == wrong:
            assert set(found) == {"liger_differs_by"} and found["liger_differs_by"] > 1e-3
        else:
            assert found["liger_over_ours"] == pytest.approx(found["liger_seconds"] / found["ours_seconds"])


def test_gradients_are_compared() -> None:
    """Prevents a backward pass of another function from being timed."""
    case = _cases(Other())["swiglu"]

    def detached(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        return (F.silu(gate) * up + up.detach() - up,)

    assert "liger_differs_by" in measured(replace(case, other=detached), 1)


def test_without_the_other_library_ours_is_timed() -> None:
    """Prevents a rehearsal that runs nothing, and a bench that needs the other library for its own figures."""
    written: dict[str, Any] = {}
    kernels(written.update, small=True)
    assert written.keys() == NAMES
    assert all(set(one) == {"ours_seconds"} and one["ours_seconds"] > 0 for one in written.values())
