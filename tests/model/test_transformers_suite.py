"""transformers' own tests of a model class, run on ours: ModelTesterMixin, and GenerationTesterMixin where it is.

They come from the source package of the installed version, which `make` unpacks into the environment. That package has the tests of the
top folder only: what these import from other folders, and is not there, is an empty class here.
"""

import importlib
import sys
import unittest
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch

from moe_llava import MoeLlavaForConditionalGeneration
from moe_llava.model import MoeLlavaModel
from moe_llava.model.options import MoeOptions
from moe_llava.model.upcycling import sparse_config
from tests.conftest import IMAGE_TOKENS, tiny_config, tiny_inputs

SUITE = Path(sys.prefix, "transformers-tests", "tests")
if not SUITE.is_dir():
    pytest.skip(f"transformers' own tests are not at {SUITE}; `make .venv/tools` unpacks them", allow_module_level=True)

pytestmark = pytest.mark.slow

ELSEWHERE = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}

SKIPPED = {
    "test_inputs_embeds": "embeddings do not say where the images stand: with pixel_values they are refused",
    "test_inputs_embeds_matches_input_ids": "the same",
    **{
        f"test_model_rope_scaling_from_config_{number}_{kind}": "random ids have placeholders without an image, which a prompt may not"
        for number, kind in enumerate(("linear", "dynamic", "yarn"))
    },
    **dict.fromkeys(
        (
            "test_generate_from_inputs_embeds_0_greedy",
            "test_generate_from_inputs_embeds_1_beam_search",
            "test_generate_from_inputs_embeds_with_static_cache",
        ),
        "embeddings with pixel_values are refused; without, tests/model/test_generation.py generates from them",
    ),
    "test_inherits_generation_mixin": "it comes by way of LlavaForConditionalGeneration",
    "test_training_gradient_checkpointing_use_reentrant_true": "refused: it would give the balance loss no gradient",
}


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

    batch_size = 7  # some tests fill smaller batches up with rows that have no image
    seq_length = 1 + IMAGE_TOKENS + 8
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def get_config(self):
        return sparse_config(tiny_config("llama", layers=self.num_hidden_layers), MoeOptions())

    def prepare_config_and_inputs_for_common(self):
        """The placeholder is a low id: some tests make the vocabulary smaller."""
        config, inputs = self.get_config(), tiny_inputs(self.batch_size)
        ids = inputs["input_ids"]
        config.image_token_id = 3
        inputs["input_ids"] = ids.masked_fill(ids == 3, 4).masked_fill(ids == 98, 3)
        return config, inputs


class TestMoeLlava(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MoeLlavaModel, MoeLlavaForConditionalGeneration)
    _is_composite = True
    additional_model_inputs = ("pixel_values",)
    test_all_params_have_gradient = False  # an expert that no token takes has none

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = Tester()
        # Where the mixin finds which classes have no head, and so no loss.
        names = mock.patch.dict(common.MODEL_MAPPING_NAMES, {"moe_llava": MoeLlavaModel.__name__})
        names.start()
        self.addCleanup(names.stop)


for name, reason in SKIPPED.items():
    if hasattr(TestMoeLlava, name):  # what GenerationTesterMixin tests may be missing
        setattr(TestMoeLlava, name, unittest.skip(reason)(getattr(TestMoeLlava, name)))
