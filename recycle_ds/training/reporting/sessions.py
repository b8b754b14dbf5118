"""The story of a run over all its restarts: run_dir/summary.json, and the few lines that a job ends with.

A session is one start of the run. One that was killed leaves no end: the next start reconstructs it from the metrics it left.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.parallel.job import Job

SUMMARY = "summary.json"
KILLED, RUNNING = "killed", "running"


@dataclass
class Session:
    """One start of a run. Times are unix seconds, steps those of the run."""

    begun: float
    first_step: int
    """The step it went on from."""
    last_step: int
    ended: str = RUNNING
    """Why: "finished", "stop_at", a stop request, an error's text, or "killed"."""
    until: float = 0.0
    job: str | None = None
    restarts: int = 0
    """SLURM's count of the job's restarts."""
    repeated: int = 0
    """Steps that the session before had made beyond the checkpoint, and that this one made again."""
    lost_seconds: float = 0.0
    """From the last (logged) step that was kept to the first one of this session: work made twice, waiting, starting."""
    checkpoints: int = 0
    saving_seconds: float = 0.0
    """That training stood still for checkpoints."""
    anomalies: dict[str, int] = field(default_factory=dict)
    """Events by name: skips, retries, rollbacks, spikes, failed saves, stragglers."""


class SessionLog:
    """Kept by the first rank. `begin` must come before the metrics are trimmed to the checkpoint.

    taken_by: who has taken the run folder over, None for nobody; what is said after that is not written.
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
        self._lost_since: float | None = None
        self._anomalies: Counter[str] = Counter()

    def begin(self, step: int) -> None:
        """Opens a session that goes on from `step`; completes the one before where it was killed."""
        seen = _seen(self._metrics)
        new = Session(time.time(), step, step, job=self._job.name, restarts=self._job.restarts)
        if self._sessions:
            before = self._sessions[-1]
            if before.ended == RUNNING:
                last = max((one for one in seen if one >= before.first_step), default=before.first_step)
                before.ended, before.last_step = KILLED, last
                before.until = seen.get(last, before.begun)
            new.repeated = max(0, before.last_step - step)
            kept = max((one for one in seen if one <= step), default=None)
            self._lost_since = before.begun if kept is None else seen[kept]
        self._sessions.append(new)
        self._write()

    def stepped(self, step: int, seconds: float) -> None:
        """Takes note of a step and how long it took; what came before the session's first one is lost time."""
        session = self._sessions[-1]
        if self._lost_since is not None:
            session.lost_seconds = max(0.0, time.time() - seconds - self._lost_since)
            self._lost_since = None
        session.last_step = step

    def saved(self, seconds: float) -> None:
        """Takes note of a checkpoint, and of the seconds that training stood still for it."""
        self._sessions[-1].checkpoints += 1
        self._sessions[-1].saving_seconds += seconds
        self._write()

    def event(self, name: str) -> None:
        """Counts an anomaly."""
        self._anomalies[name] += 1
        self._sessions[-1].anomalies = dict(self._anomalies)
        self._write()

    def end(self, why: str, step: int) -> str:
        """Closes the session and returns the summary in lines."""
        session = self._sessions[-1]
        session.ended, session.until, session.last_step = why, time.time(), step
        self._write()
        return describe(self._tree(), str(self._path.parent))

    def _tree(self) -> dict[str, Any]:
        return summarise(self._sessions, self._tokens, self._target)

    def _write(self) -> None:
        if self._taken_by() is not None:
            return
        try:
            write_atomically(self._path, json.dumps(self._tree(), indent=1) + "\n")
        except OSError as error:  # a summary is no reason to lose the run
            print(f"warning: {self._path}: {error.strerror or error}", flush=True)


def summarise(sessions: list[Session], tokens_per_step: int, target: int) -> dict[str, Any]:
    """Totals over sessions, and the sessions: what summary.json holds."""
    made = sum(max(0, session.last_step - session.first_step) for session in sessions)
    last = sessions[-1]
    anomalies: Counter[str] = Counter()
    for session in sessions:
        anomalies.update(session.anomalies)
    return {
        "state": last.ended,
        "step": last.last_step,
        "steps": target,
        "steps_made": made,
        "steps_repeated": sum(session.repeated for session in sessions),
        "tokens": last.last_step * tokens_per_step,
        "restarts": len(sessions) - 1,
        "killed": sum(session.ended == KILLED for session in sessions),
        "lost_seconds": sum(session.lost_seconds for session in sessions),
        "checkpoints": sum(session.checkpoints for session in sessions),
        "saving_seconds": sum(session.saving_seconds for session in sessions),
        "anomalies": dict(sorted(anomalies.items())),
        "sessions": [asdict(session) for session in sessions],
    }


def describe(tree: dict[str, Any], name: str) -> str:
    """A summary for a person."""
    anomalies = ", ".join(f"{event} {count}" for event, count in tree["anomalies"].items()) or "none"
    return "\n".join((
        f"summary of {name}: {tree['state']} at step {tree['step']} of {tree['steps']}",
        f"  steps made {tree['steps_made']} ({tree['steps_repeated']} of them again), tokens {tree['tokens']:,}",
        f"  restarts {tree['restarts']} ({tree['killed']} sessions killed), time lost to them {tree['lost_seconds']:.0f} s",
        f"  checkpoints {tree['checkpoints']}, training stood still for them {tree['saving_seconds']:.1f} s",
        f"  anomalies: {anomalies}",
    ))  # fmt: skip


def _read(path: Path) -> list[Session]:
    """The sessions so far; none where the file is absent or damaged, which is told."""
    try:
        return [Session(**one) for one in json.loads(path.read_text(encoding="utf-8"))["sessions"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: {path} cannot be read ({error}): the summary begins anew", flush=True)
        return []


def _seen(metrics: Path) -> dict[int, float]:
    """Unix time of every step in metrics.jsonl."""
    found = {}
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut by a kill
                continue
            if isinstance(record, dict) and "loss" in record and "time" in record:
                found[int(record["step"])] = float(record["time"])
    return found
