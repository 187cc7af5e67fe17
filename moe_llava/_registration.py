"""Register the model with transformers' Auto classes, without loading its classes.

`import moe_llava` must be fast, because the command line starts with it, and the model's classes need torch. transformers finds its own
models by name: tables in `transformers.models.auto` map a model type to class names, and the module `transformers.models.<model type>` is
imported when a class is needed. This file adds our names to the tables when they are loaded, and provides that module.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

MODEL_TYPE = "moe_llava"
_HOME = f"transformers.models.{MODEL_TYPE}"
# module -> (its table, the class to add)
_TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING_NAMES", "MoeLlavaConfig"),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING_NAMES", "MoeLlavaProcessor"),
}


def register_with_transformers() -> None:
    """Add our names to tables that are loaded already, and to the others when they are loaded."""
    sys.meta_path.insert(0, _Finder())
    for name in _TABLES.keys() & sys.modules.keys():
        _enter(sys.modules[name])


def _enter(module: ModuleType) -> None:
    table, class_name = _TABLES[module.__name__]
    getattr(module, table)[MODEL_TYPE] = class_name


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == _HOME:
            return importlib.machinery.ModuleSpec(fullname, _HomeLoader())
        if fullname not in _TABLES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _TableLoader(fullname, spec.origin)
        return spec


class _HomeLoader(importlib.abc.Loader):
    """Load `transformers.models.moe_llava`: the classes of `moe_llava.model`."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        model = importlib.import_module("moe_llava.model")
        vars(module).update({name: getattr(model, name) for _, name in _TABLES.values()})


class _TableLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _enter(module)
