"""Registers the model with transformers' Auto classes when these are first imported, and not before.

`import moe_llava` must be quick (the command line starts with it), and registering imports torch. So the import of
`transformers.models.auto.*` is what
triggers it: whoever can ask an Auto class for a checkpoint has just imported one of those modules.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AUTO = "transformers.models.auto."


class _RegisterAfterAuto(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the first module of `transformers.models.auto`, loads it as usual, and then imports `moe_llava.model`."""

    def __init__(self) -> None:
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_AUTO):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        self._loader.exec_module(module)
        importlib.import_module("moe_llava.model")


def register_with_transformers() -> None:
    """Registers now if an Auto class can be in use already, otherwise as soon as one is imported."""
    if any(name.startswith(_AUTO) for name in sys.modules):
        importlib.import_module("moe_llava.model")
    else:
        sys.meta_path.insert(0, _RegisterAfterAuto())
