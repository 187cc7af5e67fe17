"""transformers' own tests of a model class, run on ours: ModelTesterMixin, and GenerationTesterMixin where it is.

They come from the source package of the installed version, which `make` unpacks into the environment. That package has the tests of the
top folder only: what these import from other folders, and is not there, is an empty class here.
"""

import importlib
import sys
import unittest
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_llava import MoeLlavaForConditionalGeneration
from moe_llava.model import MoeLlavaModel
from moe_llava.model.upcycling import sparse_config
from tests.conftest import IMAGE_TOKENS, tiny_config, tiny_inputs

SUITE = Path(sys.prefix, "transformers-tests", "tests")
if not SUITE.is_dir():
    pytest.skip(f"transformers' own tests are not at {SUITE}; `make .venv/installed` unpacks them", allow_module_level=True)

pytestmark = pytest.mark.slow

ELSEWHERE = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}

SKIPPED: dict[str, str] = {}


def suite(name: str) -> ModuleType:
    """Import a module of the suite, under a name that does not collide with this folder's."""
    package = ModuleType("transformers_suite")
    package.__path__ = [str(SUITE)]
    sys.modules[package.__name__] = package
    for module, mixin in ELSEWHERE.items():
        if not SUITE.joinpath(*module.split(".")).with_suffix(".py").exists():
            empty = ModuleType(f"{package.__name__}.{module}")
            setattr(empty, mixin, type(mixin, (), {}))
            sys.modules[empty.__name__] = empty
    return importlib.import_module(f"{package.__name__}.{name}")


common = suite("test_modeling_common")


class Tester(SimpleNamespace):
    """What the mixins want to know of the model they test."""

    batch_size = 2
    seq_length = 1 + IMAGE_TOKENS + 8
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def get_config(self):
        return sparse_config(tiny_config("llama", layers=self.num_hidden_layers))

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        config.image_token_id = 98
        return config, tiny_inputs(self.batch_size)


class TestMoeLlava(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MoeLlavaModel, MoeLlavaForConditionalGeneration)
    _is_composite = True
    test_all_params_have_gradient = False  # an expert that no token takes has none

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = Tester()


for name, reason in SKIPPED.items():
    assert callable(getattr(TestMoeLlava, name)), name
    setattr(TestMoeLlava, name, unittest.skip(reason)(getattr(TestMoeLlava, name)))
