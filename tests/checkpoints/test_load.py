import pytest
import torch

from moe_llava.checkpoints.load import CheckpointError, check_checkpoint, load_checkpoint, load_on_meta
from tests.training.conftest import tiny_base  # noqa: F401


def test_a_folder_with_its_processor(tiny_base):  # noqa: F811
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert processor.image_token == "<image>"


def test_structure_without_weights(tiny_base):  # noqa: F811
    assert {parameter.device.type for parameter in load_on_meta(tiny_base / "base").parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ('{"model_type": "llama"}', "has model_type 'llama', but must have one of llava, moe_llava"),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        check_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="it is no folder, and the hub did not give it"):
        check_checkpoint("owner/name")
