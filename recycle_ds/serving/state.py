"""What the server can do now: written by the entry point, read by the HTTP application, which runs before the model is
loaded."""

from __future__ import annotations

from dataclasses import dataclass

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.serving.worker import Worker


@dataclass(frozen=True)
class ServedModel:
    """A loaded model and the worker that decodes with it."""

    loaded: LoadedModel
    worker: Worker


@dataclass
class State:
    """model: None while it is being loaded. draining: new requests are refused. failure: why no request can be answered
    any more, in one line: a rank is lost, or the model could not be loaded."""

    model: ServedModel | None = None
    draining: bool = False
    failure: str | None = None

    @property
    def alive(self) -> bool:
        """Whether the process does its work: it loads, decodes or drains."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """Why the server is not alive."""
        if self.failure is None and self.model is not None:
            return self.model.worker.failure
        return self.failure

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.alive and self.model is not None and not self.draining
