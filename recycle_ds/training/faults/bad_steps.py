"""Detects bad steps and decides how to respond. Every rank decides from the same numbers, so all decide alike."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from recycle_ds.config import RunConfig

APPLY, SKIP, RETRY, ROLLBACK, STOP = "apply", "skip", "retry", "rollback", "stop"
# Applied steps needed before spikes are detected.
_MIN_HISTORY = 16
# Smallest deviations assumed: of the loss as a fraction of its median, and of the logarithm of the norm.
_MIN_LOSS_DEVIATION, _MIN_NORM_DEVIATION = 0.005, 0.05
# Standard deviation of a normal distribution, in units of its median absolute deviation.
_STD_PER_MAD = 1.4826


@dataclass(frozen=True)
class Fault:
    """Why a step is bad. kind: "nonfinite", "loss_spike" or "norm_spike". score: robust z-score of a spike."""

    kind: str
    score: float | None
    loss: float
    norm: float

    @property
    def text(self) -> str:
        """Description for log lines and error messages."""
        figures = f"loss {self.loss:.6g}, gradient norm {self.norm:.6g}"
        if self.score is None:
            return f"{figures}: not finite"
        quantity = "loss" if self.kind == "loss_spike" else "gradient norm"
        return f"{figures}: {quantity} spike ({self.score:.1f} robust standard deviations above the median)"


class BadSteps:
    """Judges each step by its loss and norm, and decides how to respond.

    recent: (loss, norm) of the last applied steps, from a checkpoint, so that a resumed run judges like an uninterrupted one.
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
        """(loss, norm) of the last applied steps, for a checkpoint; empty if spikes are ignored."""
        return tuple(self._recent) if self._faults.spike != "ignore" else ()

    def begin(self, loss: float) -> None:
        """Starts to judge a step; it counts as bad until its norm has been accepted."""
        self._loss = loss
        self.fault = Fault("nonfinite", None, loss, math.nan)

    def accept(self, norm: float) -> bool:
        """Whether the update may be applied, given the norm of all gradients."""
        self.fault = self._detect(self._loss, norm)
        return self.fault is None

    def respond(self, *, rollbacks: int, can_roll_back: bool) -> str:
        """The action for the step that `accept` judged last. rollbacks: how many the run has had so far."""
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
        """Records a step that was applied."""
        if self._faults.spike != "ignore":
            self._recent.append((loss, norm))

    def restart(self, recent: Iterable[tuple[float, float]]) -> None:
        """Resets the history to that of a checkpoint."""
        self._recent = deque(recent, maxlen=self._faults.spike_window)
        self.in_a_row, self._retried = 0, False

    def _detect(self, loss: float, norm: float) -> Fault | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Fault("nonfinite", None, loss, norm)
        if self._faults.spike == "ignore" or len(self._recent) < _MIN_HISTORY:
            return None
        losses = [pair[0] for pair in self._recent]
        score = robust_score(loss, losses, _MIN_LOSS_DEVIATION * abs(median(losses)))
        if score > self._faults.spike_score:
            return Fault("loss_spike", score, loss, norm)
        # norms vary by factors, so their logarithms are compared
        score = robust_score(_log(norm), [_log(pair[1]) for pair in self._recent], _MIN_NORM_DEVIATION)
        return Fault("norm_spike", score, loss, norm) if score > self._faults.spike_score else None


def robust_score(value: float, recent: list[float], min_deviation: float) -> float:
    """(value - median) / (1.4826 x median absolute deviation): a z-score that earlier outliers hardly change.

    min_deviation: smallest deviation assumed, so that noise on a flat curve is not a spike. (Iglewicz and Hoaglin, 1993.)
    """
    middle = median(recent)
    deviation = _STD_PER_MAD * median(abs(one - middle) for one in recent)
    return (value - middle) / max(deviation, min_deviation, 1e-300)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-300))
