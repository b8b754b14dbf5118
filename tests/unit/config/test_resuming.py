"""What the schema says about settings at a resume."""

from __future__ import annotations

import pytest

from recycle_ds.config.resuming import all_keys, on_resume
from recycle_ds.config.section import OnResume


def test_every_setting_says_whether_it_may_change() -> None:
    """A new setting was forgotten: a resume changed the model or the data order without a word."""
    keys = list(all_keys())
    assert {"training.profile.end", "model.rope.scaling.factor", "recycle.taps", "data.train"} <= set(keys)
    assert [key for key in keys if on_resume(key) is None] == []


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (
            OnResume.FIXED,
            ("model.hidden", "model.rope.theta", "recycle.objective", "training.seed", "training.seq_length"),
        ),
        (OnResume.FIXED, ("training.global_batch_size", "model.a_key_of_another_release")),
        (OnResume.REPORTED, ("training.learning_rate", "training.gradient_clipping", "training.schedule")),
        (OnResume.FREE, ("model.vocab_multiple", "recycle.draft_vocabulary", "training.steps", "parallel.tensor")),
        (
            OnResume.FREE,
            ("training.profile.start", "faults.spike", "data.prepare.source", "run_dir", "training.stop_at"),
        ),
    ],
)
def test_what_may_change(kind: OnResume, keys: tuple[str, ...]) -> None:
    """A field's own word did not outweigh its section's, or did not reach the fields inside it."""
    assert {key: on_resume(key) for key in keys} == dict.fromkeys(keys, kind)


def test_an_unknown_key_outside_all_sections() -> None:
    """A checkpoint of another release with a section of its own could not be resumed, or its setting was not reported."""
    assert on_resume("unheard_of.setting") is None
    assert on_resume("training.unheard_of") is None
