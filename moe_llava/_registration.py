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

PREFIX = "moe_"
_HOME = f"transformers.models.{PREFIX}"
_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_PROCESSORS = "transformers.models.auto.processing_auto"


def register_with_transformers() -> None:
    """Add our names to tables that are loaded already, and to the others when they are loaded."""
    sys.meta_path.insert(0, _Finder())
    for name in {_CONFIGURATIONS, _PROCESSORS} & sys.modules.keys():
        _enter(sys.modules[name])


def _enter(module: ModuleType) -> None:
    if module.__name__ == _PROCESSORS:
        module.PROCESSOR_MAPPING_NAMES["moe_llava"] = "MoeLlavaProcessor"
        return
    names = module.CONFIG_MAPPING_NAMES
    names.update({PREFIX + model_type: "Moe" + name for model_type, name in list(names.items())})


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(_HOME):
            return importlib.machinery.ModuleSpec(fullname, _HomeLoader())
        if fullname not in (_CONFIGURATIONS, _PROCESSORS):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _TableLoader(fullname, spec.origin)
        return spec


class _HomeLoader(importlib.abc.Loader):
    """Load `transformers.models.moe_<type>`: the sparse classes of that model type."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        auto = importlib.import_module("moe_llava.model.auto")
        vars(module).update(auto.classes_of(module.__name__.removeprefix(_HOME)))


class _TableLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _enter(module)
