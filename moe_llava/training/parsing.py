"""From YAML to dataclasses. All that is wrong with a file is told at once."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_llava.common.messages import did_you_mean


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, a line each."""


PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "null",
}


def require(package: str, what: str) -> None:
    """Raises RecipeError if `package` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise RecipeError(f"{what} needs {package}, which is not installed: pip install -e '.[adapters]'")


def read(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a file, over those of the file that it names as `base`, relative to its own place. `above`: what names it so."""
    if not file.is_file():
        raise RecipeError(f"recipe {file} does not exist")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except DuplicateKey as error:
        raise RecipeError(f"{file}, {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or no date, such as 2026-13-01
        raise RecipeError(f"{file} is not YAML in UTF-8: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{file} must hold a mapping of settings, but holds {type(raw).__name__}")
    if "base" not in raw:
        return raw
    base = file.parent / str(raw.pop("base"))
    if not base.is_file():
        raise RecipeError(f"{file} has base {base}, which does not exist")
    if base.resolve() in (chain := (*above, file.resolve())):
        raise RecipeError(f"{file} has base {base}, which is based on it in turn")
    return _over(read(base, chain), raw)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, mapping by mapping; where both have a value, that of `above`."""
    nested = {key: _over(below[key], value) for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return below | above | nested


class DuplicateKey(yaml.YAMLError):
    """A mapping has a key twice: YAML forbids it, and PyYAML would take the last one."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string, for want of a dot; this reads it as the number that everybody means. A key that stands twice is an
    error; one that also comes by `<<` is not."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise DuplicateKey(f"line {line}: the key {key.value} stands in this mapping already, in line {lines[name]}")
            lines[name] = line
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def apply_override(raw: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        problems.append(f"--set {override}: expected a.b=value")
        return
    *parents, key = path.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            problems.append(f"--set {override}: {parent} holds a value, not settings")
            return
    try:
        raw[key] = yaml.load(value, _Loader)
    except DuplicateKey as error:
        problems.append(f"--set {override}: {error}")
    except (yaml.YAMLError, ValueError):
        problems.append(f"--set {override}: {value!r} is not YAML")


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def build(kind: Any, raw: Any, where: str, problems: list[str]) -> Any:
    """An instance of the dataclass `kind` from a mapping; what is wrong goes into `problems`."""
    if not isinstance(raw, dict):
        problems.append(f"{where.rstrip('.') or 'recipe'} must be a mapping of settings, but is {raw!r}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in raw.keys() - fields.keys():
        problems.append(f"unknown key {where}{key}" + did_you_mean(str(key), fields, f"; known: {', '.join(fields)}", where))
    values = {}
    for name, f in fields.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], where + name, problems)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            problems.append(f"{where}{name} is missing")
    return None if problems else kind(**values)


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    kinds = [kind for kind in typing.get_args(hint) or [hint] if dataclasses.is_dataclass(kind)]
    if isinstance(value, str) and _fits(hint, value):
        return value
    if kinds and isinstance(value, list) and any(typing.get_origin(kind) is list for kind in typing.get_args(hint)):
        return [build(kinds[0], item, f"{where}.{index}.", problems) for index, item in enumerate(value)]
    if kinds and value is not None:
        return build(kinds[0], value, where + ".", problems)
    if not _fits(hint, value):
        problems.append(f"{where} is {value!r}, but must be {_plain(hint)}")
        return None
    return float(value) if hint is float and isinstance(value, int) else value


def _plain(hint: Any) -> str:
    """Return what a type is called in a message."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list, and each of its items {_plain(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_plain(argument) for argument in arguments)
    return PLAIN.get(hint, "a mapping of settings")


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value is of a type. A number must be finite: nan passes every comparison with a bound."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)
