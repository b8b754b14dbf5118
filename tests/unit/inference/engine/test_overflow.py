"""Requests whose logits overflow, in the compiled kernels."""

from __future__ import annotations

import pytest

from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.parameters import MIN_TEMPERATURE, SamplingParams
from tests.unit.inference.native.kernels import bf16_model, needs_kernels


@needs_kernels
@pytest.mark.parametrize(
    ("field", "value"), [("repetition_penalty", 1e-6), ("logit_bias", ((1, -1e6),)), ("presence_penalty", 1e6)]
)
def test_one_request_does_not_end_the_others(field: str, value: object) -> None:
    """A penalty or bias that overflows left nothing to sample, and an error ended all requests of the engine."""
    params = SamplingParams(temperature=MIN_TEMPERATURE, max_new_tokens=6, **{field: value})  # type: ignore[arg-type]
    engine = local_engine(bf16_model(), max_batch=2)
    plain = SamplingParams(max_new_tokens=8)
    (alone,) = engine.add([3, 4, 5], plain, "verified")
    engine.finish([alone])
    (odd,), (other,) = engine.add([1, 2, 1], params, "verified"), engine.add([3, 4, 5], plain, "verified")
    engine.finish([odd, other])
    assert len(odd.tokens) == 3 + 6
    assert other.tokens == alone.tokens


@needs_kernels
@pytest.mark.parametrize("mode", ["autoregressive", "verified"])
@pytest.mark.parametrize("temperature", [0.0, MIN_TEMPERATURE, 1.0])
def test_the_largest_bias_is_followed(mode: str, temperature: float) -> None:
    """Prevents token 0, also where it is forbidden, for a bias that overflows once it is divided by the temperature."""
    engine = local_engine(bf16_model(), max_batch=4)
    common = {"temperature": temperature, "max_new_tokens": 6, "seed": 1, "presence_penalty": -1e6}
    wanted = SamplingParams(logit_bias=((3, 1e6),), **common)  # type: ignore[arg-type]
    unwanted = SamplingParams(logit_bias=((3, -1e6),), allowed_tokens=(3,), **common)  # type: ignore[arg-type]
    answers = [engine.add([1, 2, 1], one, mode)[0] for one in (wanted, unwanted)]
    engine.finish(answers)
    assert [one.tokens[3:] for one in answers] == [[3] * 6] * 2


@needs_kernels
def test_a_seeded_text_does_not_depend_on_its_neighbours() -> None:
    """Drafts that are verified by rejection made the whole batch sample in PyTorch's operations instead of the kernels, which
    round differently."""
    engine = local_engine(bf16_model(), max_batch=3)
    seeded = SamplingParams(temperature=0.9, top_k=4, top_p=0.87, seed=5, max_new_tokens=40)
    (alone,) = engine.add([3, 4, 5], seeded, "verified")
    engine.finish([alone])
    beside = [
        engine.add([2, 5 + i], SamplingParams(0.9, max_new_tokens=40, draft_tokens=3), "verified")[0] for i in (0, 1)
    ]
    (again,) = engine.add([3, 4, 5], seeded, "verified")
    engine.finish([again, *beside])
    assert again.tokens == alone.tokens
