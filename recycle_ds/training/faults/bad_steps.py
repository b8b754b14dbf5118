"""Bad steps: which they are, and what is done about them. Every rank decides by the same numbers, so all decide alike."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from recycle_ds.config import RunConfig

APPLY, SKIP, RETRY, ROLLBACK, STOP = "apply", "skip", "retry", "rollback", "stop"
_ENOUGH = 16
# Below these shares of the median (of the loss), or in the logarithm (of the norm), nothing is a jump.
_LEAST_LOSS, _LEAST_NORM = 0.005, 0.05
# Makes the median absolute deviation of a normal distribution its standard deviation.
_NORMAL = 1.4826


@dataclass(frozen=True)
class Fault:
    """What was wrong with a step. kind: "nonfinite", "loss_spike" or "norm_spike"; score: robust standard deviations."""

    kind: str
    score: float | None
    loss: float
    norm: float

    @property
    def text(self) -> str:
        """In words."""
        figures = f"loss {self.loss:.6g}, gradient norm {self.norm:.6g}"
        if self.score is None:
            return f"{figures}: not finite"
        what = "loss" if self.kind == "loss_spike" else "gradient norm"
        return f"{figures}: the {what} jumped ({self.score:.1f} robust standard deviations)"


class BadSteps:
    """Judges each step before its update, and afterwards says what to do about it.

    recent: (loss, norm) of the last steps that were applied, from a checkpoint: a resumed run judges as the uninterrupted one.
    """

    def __init__(self, config: RunConfig, recent: Iterable[tuple[float, float]] = ()) -> None:
        self._training, self._faults = config.training, config.faults
        self._recent: deque[tuple[float, float]] = deque(recent, maxlen=config.faults.spike_window)
        self._retried = False
        self._loss = math.nan
        self.in_a_row = 0
        self.fault: Fault | None = None

    @property
    def recent(self) -> tuple[tuple[float, float], ...]:
        """What a checkpoint keeps; nothing where spikes are ignored."""
        return tuple(self._recent) if self._faults.spike != "ignore" else ()

    def begin(self, loss: float) -> None:
        """Begins to judge a step; it is bad until its norm has been accepted."""
        self._loss = loss
        self.fault = Fault("nonfinite", None, loss, math.nan)

    def accept(self, norm: float) -> bool:
        """Whether the update may be made, by the norm of all gradients."""
        self.fault = self._find(self._loss, norm)
        return self.fault is None

    def respond(self, *, rollbacks: int, can_roll_back: bool) -> str:
        """What to do about the step that `accept` judged last; `rollbacks` is how many the run has had."""
        if self.fault is None:
            self.in_a_row, self._retried = 0, False
            return APPLY
        policy = self._training.nonfinite if self.fault.kind == "nonfinite" else self._faults.spike
        if policy == RETRY and not self._retried:
            self._retried = True
            return RETRY
        self._retried = False
        if policy == ROLLBACK and can_roll_back:
            return STOP if rollbacks >= self._faults.max_rollbacks else ROLLBACK
        self.in_a_row += 1
        return STOP if policy == STOP or self.in_a_row > self._training.max_skipped_in_a_row else SKIP

    def applied(self, loss: float, norm: float) -> None:
        """Takes note of a step that was applied."""
        if self._faults.spike != "ignore":
            self._recent.append((loss, norm))

    def restart(self, recent: Iterable[tuple[float, float]]) -> None:
        """Goes back to what was known at a checkpoint."""
        self._recent = deque(recent, maxlen=self._faults.spike_window)
        self.in_a_row, self._retried = 0, False

    def _find(self, loss: float, norm: float) -> Fault | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Fault("nonfinite", None, loss, norm)
        if self._faults.spike == "ignore" or len(self._recent) < _ENOUGH:
            return None
        losses = [pair[0] for pair in self._recent]
        score = robust_score(loss, losses, _LEAST_LOSS * abs(median(losses)))
        if score > self._faults.spike_score:
            return Fault("loss_spike", score, loss, norm)
        # a norm's spread is relative: its logarithm is judged
        score = robust_score(_log(norm), [_log(pair[1]) for pair in self._recent], _LEAST_NORM)
        return Fault("norm_spike", score, loss, norm) if score > self._faults.spike_score else None


def robust_score(value: float, recent: list[float], least: float) -> float:
    """(value - median) / (1.4826 x median absolute deviation): a z-score that earlier outliers do not blunt.

    least: smallest deviation assumed, so that a quiet curve makes no jump of a tremble. (Iglewicz and Hoaglin, 1993.)
    """
    middle = median(recent)
    deviation = _NORMAL * median(abs(one - middle) for one in recent)
    return (value - middle) / max(deviation, least, 1e-300)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-300))
