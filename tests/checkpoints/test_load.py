import torch

from moe_llava.checkpoints.load import load_checkpoint, load_on_meta
from tests.training.conftest import tiny_base  # noqa: F401


def test_a_folder_with_its_processor(tiny_base):  # noqa: F811
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert processor.image_token == "<image>"


def test_structure_without_weights(tiny_base):  # noqa: F811
    assert {parameter.device.type for parameter in load_on_meta(tiny_base / "base").parameters()} == {"meta"}
