"""Observers that a configuration names, `training.observers=[module:Class]`, and the checks of what it asks for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence

from recycle_ds.config import ConfigError, TrainingConfig
from recycle_ds.training.observers.observer import Observer


def observer_class(name: str) -> type[Observer]:
    """The class of `module:Class`. Raises ConfigError if it cannot be imported, or is no observer."""
    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise ConfigError(f"training.observers: {name!r} must be module:Class, such as my_observers:Alarm")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's file raises
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"training.observers: {name} cannot be imported ({cause}): correct it, or add its folder to PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Observer)):
        what = "does not exist" if found is None else "is no subclass of recycle_ds.training.observers.Observer"
        raise ConfigError(f"training.observers: {name} {what}")
    return found


def check_observers(training: TrainingConfig, given: Iterable[object] = ()) -> None:
    """Raises ConfigError for an observer that does not exist, and if Weights & Biases is asked for and not installed."""
    for name in training.observers:
        observer_class(name)
    for one in given:
        if not isinstance(one, Observer):
            hint = "; add () to it" if isinstance(one, type) else ""
            raise ConfigError(f"observers: {one!r} is no instance of recycle_ds.training.observers.Observer{hint}")
    if training.wandb is not None:
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder `wandb` of logs looks like a package without files
            raise ConfigError(
                f"training.wandb={training.wandb} needs the package wandb, which is not installed: pip install wandb, or "
                "set training.wandb=null"
            )


def users_observers(training: TrainingConfig, given: Sequence[Observer], *, first: bool) -> list[Observer]:
    """The observers of the configuration, then those `given`. first: whether this is rank 0: only it creates the others than
    those of every rank. Raises ConfigError if one cannot be created."""
    found: list[Observer] = []
    for name in training.observers:
        kind = observer_class(name)
        if not (first or kind.every_rank):
            continue
        try:
            found.append(kind())
        except Exception as error:  # whatever the user's class raises
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"training.observers: {name} cannot be created without arguments ({cause})") from error
    return [*found, *given]
