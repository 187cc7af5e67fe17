import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from moe_llava.checkpoints.load import load_checkpoint, load_on_meta, load_processor
from moe_llava.model import upcycle
from tests.conftest import tiny_config
from tests.training.conftest import tiny_base  # noqa: F401

# Loads checkpoints, reads every page of their weights, and tells of each by how many bytes the peak of memory grew, and what is no map of a
# file. In a process of its own, where no memory that was freed before can be used again.
GROWTH = """
import json, sys
from pathlib import Path
from moe_llava.checkpoints.load import load_checkpoint, load_on_meta

def memory(key):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024

kept, found = [load_on_meta(sys.argv[1])], []  # what this imports does not count
for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, anonymous = memory("VmRSS"), memory("RssAnon")
    kept.append(load_checkpoint(path)[0])
    for parameter in kept[-1].parameters():
        parameter.view(-1)[::64].sum()
    found.append((memory("VmHWM") - before, memory("RssAnon") - anonymous))
print(json.dumps(found))
"""


def test_a_folder_with_its_processor(tiny_base):  # noqa: F811
    model, processor = load_checkpoint(tiny_base / "base", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert processor.image_token == "<image>"


def test_structure_without_weights(tiny_base):  # noqa: F811
    assert {parameter.device.type for parameter in load_on_meta(tiny_base / "base").parameters()} == {"meta"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="tells its peak of memory by /proc")
def test_weights_are_mapped_not_copied(tiny_base, tmp_path):  # noqa: F811
    """With every weight read, the peak of memory has grown by the weights' size; what is not a map of their files is a fraction of it."""
    config = tiny_config("llama")
    config.text_config.hidden_size, config.text_config.intermediate_size, config.text_config.vocab_size = 256, 4096, 1000
    sparse = upcycle(LlavaForConditionalGeneration(config), num_experts=4)
    processor = load_processor(tiny_base / "base")
    for folder, dtype, shard in (("shards", torch.float32, "40MB"), ("half", torch.bfloat16, "1GB")):
        sparse.to(dtype).save_pretrained(tmp_path / folder, max_shard_size=shard)
        processor.save_pretrained(tmp_path / folder)
    measured = subprocess.run([sys.executable, "-c", GROWTH, tmp_path / "shards", tmp_path / "half"], capture_output=True, text=True)
    assert measured.returncode == 0, measured.stderr
    for folder, (peak, anonymous) in zip(("shards", "half"), json.loads(measured.stdout), strict=True):
        files = list((tmp_path / folder).glob("*.safetensors"))
        assert (len(files) > 1) == (folder == "shards")
        size = sum(file.stat().st_size for file in files)
        assert size > 60e6
        assert 0.8 * size < peak < 1.15 * size
        assert anonymous < 0.15 * size
