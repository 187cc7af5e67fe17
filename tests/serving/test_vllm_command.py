"""The verb vllm: the command line for a checkpoint, and the memory of a device."""

import pytest

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_config
from moe_llava.checkpoints.native import export_native
from moe_llava.serving.vllm_command import Layout, device_bytes
from moe_llava.training.budget import count, survey
from tests.conftest import refused, run_here
from tests.vlm import tiny_vlm


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a sparse model of a family, and returns its folder."""

    def save(family, native=False, **options):
        folder = tmp_path_factory.mktemp("saved") / "model"
        sparse = upcycle(tiny_vlm(family), **options)
        (export_native(sparse) if native else sparse).save_pretrained(folder)
        return folder

    return save


def printed(*arguments):
    done = run_here("vllm", *arguments)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_the_command(saved):
    sparse, native, split = saved("internvl"), saved("qwen3_vl", native=True), saved("llava", routing="modality_split")
    command, memory = printed(sparse)
    assert command == f"vllm serve {sparse} --model-impl transformers --trust-remote-code"
    weights, cache = device_bytes(survey(str(sparse))[0], load_config(sparse), Layout())
    assert memory == (
        f"each device, computed: {weights / 2**30:.3g} GiB of weights in bfloat16, {cache / 2**10:.3g} KiB of cache for a token"
    )
    assert not memory.startswith("each device, computed: 0 GiB")
    parallel = ("--tensor-parallel", "2", "--data-parallel", "4", "--expert-parallel", "--nodes", "2")
    options = "--tensor-parallel-size 2 --data-parallel-size 4 --enable-expert-parallel --distributed-executor-backend ray"
    assert printed(native, *parallel)[0] == f"vllm serve {native} {options}"
    assert printed(split)[0] == f"vllm serve {split}"  # the plugin is found by the architecture's name


def test_what_vllm_computes_otherwise_is_refused(saved, tmp_path):
    assert "because it drops the deepstack features of the vision tower; export it" in refused("vllm", saved("qwen3_vl"))
    assert "by which the tokens of an image attend to each other in both directions; use `moe-llava serve`" in refused(
        "vllm", saved("gemma3")
    )
    assert "has capacity_factor 1.5: the tokens of a batch share it" in refused("vllm", saved("llava", capacity_factor=1.5))
    assert "has moe_in ['projector']: vLLM serves experts in the language model alone" in refused(
        "vllm", saved("llava", moe_in=["projector"])
    )
    assert "--tensor-parallel is 3, but must divide the 4 attention heads of the language model" in refused(
        "vllm", saved("internvl"), "--tensor-parallel", "3"
    )
    assert "--nodes is 3, but must divide 4 devices" in refused("vllm", saved("internvl"), "--tensor-parallel", "4", "--nodes", "3")
    tiny_vlm("llava").save_pretrained(tmp_path / "dense")
    assert "is neither sparse nor an export" in refused("vllm", tmp_path / "dense")


def test_memory_of_a_device():
    sparse = upcycle(tiny_vlm("internvl"), num_experts=4)
    budget, config = count(sparse), sparse.config
    whole, cache = device_bytes(budget, config, Layout())
    assert (whole, cache) == (budget.weight_bytes, budget.cache_bytes)
    tower = 2 * (budget.total["tower"] + budget.total["projector"])
    assert device_bytes(budget, config, Layout(tensor_parallel=2)) == (tower + (whole - tower) // 2, cache // 2)
    # Each of four devices has one of the two heads of keys and values.
    assert config.get_text_config().num_key_value_heads == 2
    assert device_bytes(budget, config, Layout(tensor_parallel=4)) == (tower + (whole - tower) // 4, cache // 2)
    experts = 2 * budget.total["experts"]
    divided = device_bytes(budget, config, Layout(tensor_parallel=2, data_parallel=2, expert_parallel=True))[0]
    assert divided == tower + (whole - tower - experts) // 2 + experts // 4
