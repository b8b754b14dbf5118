"""How values are written in a run's YAML file and in overrides: YAML 1.1, without its surprises."""

from __future__ import annotations

from typing import Any

import yaml

from recycle_ds.config.errors import ConfigError


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML 1.1 keeps the last silently) and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *defaults
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} is no name of a setting")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _number_or_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """YAML 1.1 reads `3e-4` as a string; every person who types it means a number."""
    text = loader.construct_scalar(node)
    if node.style is None and text[:1] in "+-.0123456789":
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """YAML 1.1 reads 1:30 as 90 and 010 as 8: the first is text here, the second an error."""
    text = loader.construct_scalar(node)
    if ":" in text:
        return text
    if text.lstrip("+-")[:1] == "0" and text.lstrip("+-0_")[:1].isdigit():
        line = node.start_mark.line + 1
        raise ConfigError(f"line {line}: {text} would be read as octal: write it without leading zeros, or in quotes")
    return loader.construct_yaml_int(node)


Loader.add_constructor("tag:yaml.org,2002:str", _number_or_text)
Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_NO_TEXT = ("tag:yaml.org,2002:timestamp",)  # the name of a run may be a date
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NO_TEXT]
    for first, resolvers in Loader.yaml_implicit_resolvers.items()
}
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""Errors of the parser; beside its own, of numbers of thousands of digits and of brackets nested too deeply."""
