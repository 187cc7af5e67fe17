from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from moe_llava.checkpoints.load import load_checkpoint, load_on_meta, load_processor
from moe_llava.model import upcycle
from tests.checkpoints.fresh import growth_by_loading
from tests.conftest import in_fresh_process, tiny_config
from tests.training.conftest import tiny_base  # noqa: F401


def test_a_folder_with_its_processor(tiny_base):  # noqa: F811
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert processor.image_token == "<image>"


def test_structure_without_weights(tiny_base):  # noqa: F811
    assert {parameter.device.type for parameter in load_on_meta(tiny_base / "base").parameters()} == {"meta"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="tells its peak of memory by /proc")
def test_weights_are_mapped_not_copied(tiny_base, tmp_path):  # noqa: F811
    """With every weight read, the peak of memory has grown by the size of the weights, and almost all of it maps their files."""
    config = tiny_config("llama")
    config.text_config.hidden_size, config.text_config.intermediate_size, config.text_config.vocab_size = 256, 4096, 1000
    sparse = upcycle(LlavaForConditionalGeneration(config), num_experts=4)
    processor = load_processor(tiny_base / "base")
    for folder, dtype, shard in (("shards", torch.float32, "40MB"), ("half", torch.bfloat16, "1GB")):
        sparse.to(dtype).save_pretrained(tmp_path / folder, max_shard_size=shard)
        processor.save_pretrained(tmp_path / folder)
    measured = in_fresh_process(growth_by_loading, [tmp_path / "shards", tmp_path / "half"])
    for folder, (peak, anonymous) in zip(("shards", "half"), measured, strict=True):
        files = list((tmp_path / folder).glob("*.safetensors"))
        assert (len(files) > 1) == (folder == "shards")
        size = sum(file.stat().st_size for file in files)
        assert size > 60e6
        assert 0.8 * size < peak < 1.15 * size
        assert anonymous < 0.15 * size
