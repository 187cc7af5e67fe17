"""Read YAML into dataclasses. pydantic checks them; all problems of a file are reported at once."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from moe_llava.common.messages import did_you_mean


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, a line each."""


# pydantic's types of errors -> the rule, for a message of the form "KEY is VALUE, but must be RULE"
RULES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of settings",
    "dataclass_type": "a mapping of settings",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list that is not empty",
}


def require(package: str, what: str) -> None:
    """Raise RecipeError if `package` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise RecipeError(f"{what} needs {package}, which is not installed: pip install -e '.[adapters]'")


def read(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings in a file, merged over those of its `base`, a path relative to the file. `above`: the files that led to it."""
    if not file.is_file():
        raise RecipeError(f"recipe {file} does not exist")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except DuplicateKey as error:
        raise RecipeError(f"{file}, {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no date, such as 2026-13-01
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
    return _merge(read(base, chain), raw)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings, nested ones too. Where both have a value, `above` wins."""
    nested = {
        key: _merge(below[key], value) for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | nested


class DuplicateKey(yaml.YAMLError):
    """A mapping has a key twice. YAML forbids it; PyYAML would take the last one."""


class _Loader(yaml.SafeLoader):
    """Read 1e-3 as a number, which YAML 1.1 reads as text for want of a dot. Refuse duplicate keys, unless one comes by `<<`."""

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
    """Set a value in `raw`. `override` has the form "a.b=value", with a value in YAML."""
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
    """Return an instance of the dataclass `kind` from a mapping, or None after adding to `problems`. `where`: prefix of keys in messages.

    pydantic is handed JSON: from Python objects, its strict mode builds no dataclasses.
    """
    try:
        text = json.dumps(raw, default=lambda value: [[]])  # a date, for example: it fits no setting, and neither does this
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        problems += _describe(error, kind, raw, where)
    except (TypeError, ValueError) as error:
        problems.append(f"{where.rstrip('.') or 'recipe'} holds what JSON cannot: {error}")
    return None


def _describe(error: ValidationError, kind: Any, raw: Any, where: str) -> list[str]:
    """Return a line for each problem. Of a union, the lines about the type that fits best, or one line that names all types."""
    problems: list[str] = []
    broken: dict[tuple[Any, ...], list[str]] = {}
    found = [(entry, *_locate(entry, raw)) for entry in error.errors(include_url=False)]
    for entry, path, value in found:
        name = where + ".".join(map(str, path))
        if entry["type"] == "missing":
            problems.append(f"{name} is missing")
        elif entry["type"] == "unexpected_keyword_argument":
            key, known = str(path[-1]), [field.name for field in dataclasses.fields(_dataclass_in(_hint_at(kind, path[:-1])))]
            problems.append(f"unknown key {name}" + did_you_mean(key, known, f"; known: {', '.join(known)}", name.removesuffix(key)))
        elif not any(other[: len(path)] == path != other for _, other, _ in found):
            broken.setdefault(path, [f"{name.rstrip('.') or 'recipe'} is {value!r}, but must be "]).append(_rule(entry))
    for path, (start, *alternatives) in broken.items():
        alternatives += ["null"] if type(None) in typing.get_args(_hint_at(kind, path)) else []
        problems.append(start + ", or ".join(dict.fromkeys(alternatives)))
    return problems


def _rule(entry: ErrorDetails) -> str:
    if entry["type"] == "literal_error":
        choices = entry["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"one of {choices}" if ", " in choices else choices
    return RULES[entry["type"]].format(**entry.get("ctx", {})) if entry["type"] in RULES else entry["msg"]


def _locate(entry: ErrorDetails, raw: Any) -> tuple[tuple[int | str, ...], Any]:
    """Return the path to the setting that an error is about, and its value. pydantic's path also names the types of unions."""
    path: list[int | str] = []
    for number, key in enumerate(entry["loc"], start=1):
        absent = entry["type"] in ("missing", "unexpected_keyword_argument") and number == len(entry["loc"])
        if isinstance(raw, dict) and (key in raw or absent):
            path, raw = [*path, key], raw.get(key)
        elif isinstance(raw, list) and isinstance(key, int):
            path, raw = [*path, key], raw[key]
    return tuple(path), raw


def _hint_at(kind: Any, path: tuple[int | str, ...]) -> Any:
    """Return the type of the setting at `path` in a mapping that `kind` describes."""
    for key in path:
        if isinstance(key, str):
            kind = typing.get_type_hints(_dataclass_in(kind))[key]
    return kind


def _dataclass_in(hint: Any) -> Any:
    return hint if dataclasses.is_dataclass(hint) else next(filter(None, map(_dataclass_in, typing.get_args(hint))), None)
