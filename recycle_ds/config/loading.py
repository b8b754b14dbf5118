"""YAML and dotted overrides to a `RunConfig`, with errors that name the dotted path and the nearest valid key."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.config.errors import ConfigError
from recycle_ds.config.schema import RunConfig
from recycle_ds.config.shipped import RUNS, find_config, names
from recycle_ds.config.yaml_values import UNREADABLE, Loader

SectionType = TypeVar("SectionType", bound=BaseModel)


Defaults = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From a tree of settings to a tree of further ones, which hold where the first does not say otherwise."""


def load_config(
    path: str | os.PathLike[str], overrides: Iterable[str] = (), defaults: Defaults | None = None
) -> RunConfig:
    """Reads a YAML file, applies `section.key=value` overrides in order and validates the result.

    path: a file, or the name of a shipped configuration (`demo`). defaults: called with the tree of settings before it
    is validated; returns settings that hold where the tree has none. Raises ConfigError for an unreadable file, broken
    YAML, an unknown key or a value that does not fit, and whatever `defaults` raises."""
    file = find_config(path, RUNS)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).stem, names(RUNS), n=1)
        meant = f", did you mean {near[0]}?" if near else ";"
        raise ConfigError(f"--config {path}: no such file{meant} shipped ones are {', '.join(names(RUNS))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from None
    return parse_config(_read_yaml(text, str(path)), overrides, defaults)


def parse_config(tree: Mapping[str, Any], overrides: Iterable[str] = (), defaults: Defaults | None = None) -> RunConfig:
    """Validates a mapping with overrides and defaults applied, see `load_config`. Raises ConfigError."""
    try:
        merged = _copy(tree)
    except RecursionError:
        raise ConfigError("the settings are nested too deeply, or a YAML alias contains itself") from None
    for override in overrides:
        _apply(merged, override)
    if defaults is not None:
        _check_what_is_given(merged)
        merged = _lay_under(merged, defaults(merged))
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _check_what_is_given(tree: Mapping[str, Any]) -> None:
    """Raises ConfigError for faults that no default can mend, such as a misspelt key, before defaults are looked up."""
    try:
        RunConfig.model_validate(tree)
    except ValidationError as error:
        if any(fault["type"] != "missing" for fault in error.errors(include_url=False)):
            raise ConfigError(_one_line(error, missing=False)) from None


def build_section(section: type[SectionType], fields: Mapping[str, Any]) -> SectionType:
    """Validates one section on its own. Raises ConfigError."""
    try:
        return section.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved tree as YAML, atomically."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(path, text)


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=Loader)  # noqa: S506 - Loader is a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except UNREADABLE as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def _copy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copy(value) for value in tree]
    return tree


def _lay_under(tree: Any, defaults: Any) -> Any:
    """`tree` with the keys of `defaults` that it does not have, section by section."""
    if not (isinstance(tree, Mapping) and isinstance(defaults, Mapping)):
        return tree
    filled = {key: _lay_under(tree[key], value) if key in tree else value for key, value in defaults.items()}
    return {**tree, **filled}


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted key. A list element is addressed by its number: `data.train.0.weight=2`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.load(text, Loader=Loader) if text else ""  # noqa: S506 - Loader is a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{dotted}={text}: {error}") from None
    except UNREADABLE:
        value = text
    *parents, last = dotted.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list):
            node = node[_element(node, parent, dotted)]
        else:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{dotted}: {parent!r} is a value, not a section")
    if isinstance(node, list):
        node[_element(node, last, dotted)] = value
    else:
        node[last] = value


def _element(node: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"{dotted}: {key!r} is not an element of a list of {len(node)}")
    return int(key)


def _one_line(error: ValidationError, *, missing: bool = True) -> str:
    """All faults of a ValidationError on one line, the keys' neighbours suggested."""
    faults: list[dict[str, Any]] = [
        dict(fault) for fault in error.errors(include_url=False) if missing or fault["type"] != "missing"
    ]
    places: list[tuple[Any, ...]] = [tuple(fault["loc"]) for fault in faults]
    # A section that fails because something inside it does adds nothing to the inner fault.
    inner = [f for f, at in zip(faults, places, strict=True) if not any(o[: len(at)] == at and o != at for o in places)]
    return "; ".join(_describe(fault) for fault in inner)


def _describe(fault: dict[str, Any]) -> str:
    location = tuple(fault["loc"])
    dotted = ".".join(str(part) for part in location)
    kind, value = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        return f"{dotted}={value!r}: unknown key{_suggestion(location)}"
    if kind == "missing":
        return f"{dotted}: required, not given"
    if kind == "value_error":
        message = str(fault["ctx"]["error"])
        return f"{dotted}: {message}" if dotted else message
    shown = "null" if value is None else repr(value)
    return f"{dotted}={shown}: {_expected(kind, value, fault['msg'], location)}"


def _expected(kind: str, value: Any, message: str, location: tuple[Any, ...]) -> str:
    """What a value must be, in the terms of the YAML file instead of pydantic's."""
    field = _field_at(location)
    section = _model_in(field) if field is not None else None
    if section is not None and kind in ("tuple_type", "too_short"):
        path = value if isinstance(value, str) and value else "PATH"
        least = "a list" if kind == "tuple_type" else "a list of at least one entry"
        return f"must be {least}, such as [{{path: {path}, weight: 1}}]"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = list(section.model_fields) if section is not None else []
        example = f", such as {keys[0]}: VALUE" if keys else ""
        return f"must be a section of keys and values{example}"
    if kind == "int_parsing_size":
        return "must be a smaller number"
    message = message.partition(", unable to")[0].removeprefix("Input should be ").removeprefix("a valid ")
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    for name, word in words.items():
        if message == name or message.startswith(f"{name},"):
            return f"must be {word}"
    return f"must be {message}"


def _suggestion(location: tuple[Any, ...]) -> str:
    """Nearest valid key: in the same section first, then anywhere in the tree."""
    section: Any = RunConfig
    for part in location[:-1]:
        section = _section_of(section, part)
        if section is None:
            return ""
    wrong = str(location[-1])
    prefix = "".join(f"{part}." for part in location[:-1])
    siblings = list(section.model_fields)
    near = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6)
    if near:
        return f", did you mean {prefix}{near[0]}?"
    leaves = {path.rsplit(".", 1)[-1]: path for path in _paths(RunConfig)}
    near = difflib.get_close_matches(wrong, list(leaves), n=1, cutoff=0.75)
    if near:
        return f", did you mean {leaves[near[0]]}?"
    return f"; valid here: {', '.join(siblings)}"


def _section_of(section: type[BaseModel], part: Any) -> type[BaseModel] | None:
    if isinstance(part, int):  # an element of a tuple of sections: the section was resolved with the field
        return section
    field = section.model_fields.get(str(part))
    return _model_in(field.annotation) if field else None


def _field_at(location: tuple[Any, ...]) -> Any:
    """The annotation of the field at a location of the tree, None if there is none."""
    section: type[BaseModel] | None = RunConfig
    annotation: Any = None
    for part in location:
        if isinstance(part, int):  # an element of a list of sections
            continue
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is None:
            return None
        annotation = field.annotation
        section = _model_in(annotation)
    return annotation


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section type inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        for inner in typing.get_args(annotation):
            found = _model_in(inner)
            if found:
                return found
    return None


def _paths(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        inner = _model_in(field.annotation)
        yield f"{prefix}{name}"
        if inner is not None:
            yield from _paths(inner, f"{prefix}{name}.")
