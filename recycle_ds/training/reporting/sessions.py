"""The record of a run over all its restarts: run_dir/summary.json, and the lines that a job prints at its end.

A session is one start of the run that ran steps. A killed session cannot write its end: the next start reconstructs it from the
metrics it left.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recycle_ds.config.atomic_files import write_json_atomically
from recycle_ds.parallel.job import Job
from recycle_ds.training.faults.stop_requests import REASONS

SUMMARY = "summary.json"
KILLED, RUNNING = "killed", "running"
# How a session may end or stand; any other text is an error message.
_COMPLETE = ("finished", "stop_at")
_ENDINGS = (*_COMPLETE, KILLED, RUNNING, *REASONS)


@dataclass
class Session:
    """One start of the run. Times are unix seconds, steps those of the run."""

    begun: float
    """Start time."""
    first_step: int
    """Step of the checkpoint that it resumed from, 0 for a new run."""
    last_step: int
    ended: str = RUNNING
    """Why it ended: "finished", "stop_at", a stop request, an error message, or "killed"."""
    until: float = 0.0
    """End time; of a killed session, the time of its last logged step."""
    job: str | None = None
    restarts: int = 0
    """SLURM's restart count of the job."""
    repeated: int = 0
    """Steps that the previous session had run beyond the checkpoint, and that this one ran again."""
    lost_seconds: float = 0.0
    """Work of the previous session that was not kept, and the time from this session's start to its first step."""
    idle_seconds: float = 0.0
    """From the end of the previous session to the start of this one, in the queue for example: nothing ran."""
    checkpoints: int = 0
    saving_seconds: float = 0.0
    """Time that training was blocked by checkpoints."""
    anomalies: dict[str, int] = field(default_factory=dict)
    """Events by name: skips, retries, rollbacks, spikes, failed saves, stragglers."""


class SessionLog:
    """Kept by the first rank. Call `begin` before the metrics are trimmed to the checkpoint.

    taken_by: which other start has taken over the run folder, None for no other; nothing is written after that.
    """

    def __init__(
        self,
        run_dir: Path,
        job: Job,
        *,
        tokens_per_step: int,
        target: int,
        taken_by: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._path, self._tokens, self._target = run_dir / SUMMARY, tokens_per_step, target
        self._metrics = run_dir / "metrics.jsonl"
        self._job, self._taken_by = job, taken_by
        self._sessions = _read(self._path)
        self._unstarted = False
        self._anomalies: Counter[str] = Counter()

    def begin(self, step: int, started: float | None = None) -> None:
        """Opens a session that resumes at `step`; completes the previous one if it was killed.

        started: when this process began to work on the run, unix seconds; None is now.
        """
        logged = _logged_steps(self._metrics)
        new = Session(
            time.time() if started is None else started, step, step, job=self._job.name, restarts=self._job.restarts
        )
        if self._sessions:
            before = self._sessions[-1]
            if before.ended == RUNNING:
                # its first step may have been logged by the session before it
                last = max((one for one in logged if one > before.first_step), default=None)
                before.ended, before.last_step = KILLED, before.first_step if last is None else last
                before.until = before.begun if last is None else max(before.begun, logged[last])
            new.repeated = max(0, before.last_step - step)
            new.idle_seconds = max(0.0, new.begun - before.until)
            kept = max((one for one in logged if one <= step), default=None)
            # the kept step may be one that an older session logged: only what the previous session did is lost
            since = before.begun if kept is None else max(before.begun, logged[kept])
            new.lost_seconds = max(0.0, before.until - since)
        self._unstarted = True
        self._sessions.append(new)
        self._write()

    def stepped(self, step: int, seconds: float) -> None:
        """Records a step and how long it took. The time before a restart's first step counts as lost."""
        session = self._sessions[-1]
        if self._unstarted and len(self._sessions) > 1:
            session.lost_seconds += max(0.0, time.time() - seconds - session.begun)
        self._unstarted = False
        session.last_step = step

    def saved(self, seconds: float) -> None:
        """Records a checkpoint, and the seconds that training was blocked by it."""
        self._sessions[-1].checkpoints += 1
        self._sessions[-1].saving_seconds += seconds
        self._write()

    def event(self, name: str) -> None:
        """Counts an anomaly."""
        self._anomalies[name] += 1
        self._sessions[-1].anomalies = dict(self._anomalies)
        self._write()

    def end(self, why: str, step: int, *, refused: bool = False) -> str | None:
        """Closes the session and returns the summary as text.

        refused: the start ended before its first step because of an error of the user's, or had no step to run: it was no
        restart, the record stays as it was, and None is returned.
        """
        session = self._sessions[-1]
        if refused and self._unstarted and not self._anomalies:
            self._sessions.pop()
            if self._sessions:
                if why in _COMPLETE:  # of a session that was killed after its last step, or whose target has changed
                    self._sessions[-1].ended = why
                self._write()
            elif self._taken_by() is None:
                self._path.unlink(missing_ok=True)
            return None
        session.ended, session.until, session.last_step = why, time.time(), step
        self._write()
        return describe(self._tree(), str(self._path.parent))

    def _tree(self) -> dict[str, Any]:
        return summarise(self._sessions, self._tokens, self._target)

    def _write(self) -> None:
        if self._taken_by() is not None:
            return
        try:
            write_json_atomically(self._path, self._tree())
        except OSError as error:  # a summary is no reason to lose the run
            print(f"warning: {self._path}: {error.strerror or error}", flush=True)


def summarise(sessions: list[Session], tokens_per_step: int, target: int) -> dict[str, Any]:
    """Totals over sessions, and the sessions: the content of summary.json."""
    last = sessions[-1]
    anomalies: Counter[str] = Counter()
    for session in sessions:
        anomalies.update(session.anomalies)
    return {
        "state": last.ended,
        "step": last.last_step,
        "steps": target,
        "steps_run": sum(max(0, session.last_step - session.first_step) for session in sessions),
        "steps_repeated": sum(session.repeated for session in sessions),
        "tokens": last.last_step * tokens_per_step,
        "restarts": len(sessions) - 1,
        "killed": sum(session.ended == KILLED for session in sessions),
        "lost_seconds": sum(session.lost_seconds for session in sessions),
        "idle_seconds": sum(session.idle_seconds for session in sessions),
        "checkpoints": sum(session.checkpoints for session in sessions),
        "saving_seconds": sum(session.saving_seconds for session in sessions),
        "anomalies": dict(sorted(anomalies.items())),
        "sessions": [asdict(session) for session in sessions],
    }


def describe(tree: dict[str, Any], name: str) -> str:
    """A summary as text, for a terminal or a log."""
    anomalies = ", ".join(f"{event} {count}" for event, count in tree["anomalies"].items()) or "none"
    restarts = f"  restarts {tree['restarts']}"
    if tree["restarts"]:
        restarts += f" ({tree['killed']} after a kill), {tree['lost_seconds']:.0f} s of repeated work and start-up, "
        restarts += f"{tree.get('idle_seconds', 0):.0f} s idle in between"
    run = tree.get("steps_run", tree.get("steps_made", 0))  # the older name is that of release 0.1
    state = tree["state"] if tree["state"] in _ENDINGS else "failed"
    return "\n".join((
        f"summary of {name}: {state} at step {tree['step']} of {tree['steps']}",
        f"  {run} steps run, {tree['steps_repeated']} repeated, {tree['tokens']:,} tokens",
        restarts,
        f"  checkpoints {tree['checkpoints']}, training blocked by them for {tree['saving_seconds']:.1f} s",
        f"  anomalies: {anomalies}",
        *([f"  error: {' '.join(tree['state'].split())}"] if state != tree["state"] else []),
    ))  # fmt: skip


def _read(path: Path) -> list[Session]:
    """The sessions so far; none if the file is absent, or damaged, which is reported."""
    try:
        return [Session(**one) for one in json.loads(path.read_text(encoding="utf-8"))["sessions"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: {path} cannot be read ({error}): starting a new summary", flush=True)
        return []


def _logged_steps(metrics: Path) -> dict[int, float]:
    """Unix time of every step in metrics.jsonl."""
    found = {}
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill
                continue
            if isinstance(record, dict) and "loss" in record and "time" in record:
                found[int(record["step"])] = float(record["time"])
    return found
