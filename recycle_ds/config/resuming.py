"""Which settings may change when a run is resumed, as the schema's fields say."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recycle_ds.config.schema import RunConfig
from recycle_ds.config.section import OnResume


def on_resume(key: str) -> OnResume | None:
    """What a setting such as `training.seed` is at a resume: what its field says, else the nearest section around it.

    A key that the schema does not have, perhaps one of another release, is what its section is. None if nothing says so.
    """
    found: OnResume | None = None
    section: type[BaseModel] | None = RunConfig
    for name in key.split("."):
        field = None if section is None else section.model_fields.get(name)
        if field is None:
            break
        found = next((mark for mark in field.metadata if isinstance(mark, OnResume)), found)
        section = _section(field)
    return found


def all_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings. Elements of a list have no name of their own."""
    for name, field in section.model_fields.items():
        inner = _section(field)
        if inner is None:
            yield prefix + name
        else:
            yield from all_keys(inner, f"{prefix}{name}.")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or may hold."""
    is_optional = get_origin(field.annotation) in (Union, UnionType)
    candidates = get_args(field.annotation) if is_optional else (field.annotation,)
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)
