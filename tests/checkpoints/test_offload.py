"""Offloaded experts: bit-equal results, prefetching, and refusals."""

import os
import shutil
import threading
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import peft
import psutil
import pytest
import torch
from transformers import AutoModelForImageTextToText, SmolVLMConfig, SmolVLMForConditionalGeneration

from moe_llava import upcycle
from moe_llava.checkpoints.files import check_checkpoint
from moe_llava.checkpoints.offload import Counts, ExpertCache, FileStack, MemoryStack, RouteStatistics, load_offloaded, offload_experts
from moe_llava.checkpoints.weights import StoredTensor
from moe_llava.common.errors import CheckpointError
from moe_llava.model import MoeLlavaForConditionalGeneration
from moe_llava.model.options import MoeOptions
from moe_llava.model.upcycling import sparse_config
from tests.conftest import tiny_config, tiny_inputs
from tests.model.test_equivalences import shuffled_sparse

CPU = torch.device("cpu")
EAGER = SimpleNamespace(config=SimpleNamespace(_experts_implementation="eager"))
WRITE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a sparse model with different experts, once for each kind."""
    folders = {}

    def save(family="llama", dtype=torch.float32, **settings):
        kind = (family, dtype, *settings.items())
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(family)
            shuffled_sparse(family, moe_layers="all", **settings).to(dtype).save_pretrained(folders[kind], max_shard_size="60KB")
        return folders[kind]

    return save


def load(folder) -> MoeLlavaForConditionalGeneration:
    """Return the whole model, with the backend of an offloaded one."""
    model = MoeLlavaForConditionalGeneration.from_pretrained(folder)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"dtype": torch.bfloat16}),
        ("phi", {"use_residual": True}),
        ("qwen2", {"num_experts_per_tok": 1, "use_residual": True}),
        ("phi", {"num_experts_per_tok": 1, "capacity_factor": 1.0}),
    ],
)
@torch.no_grad()
def test_the_same_to_the_bit(saved, monkeypatch, family, settings, on_disk):
    """There are slots for 3 of 16 experts, fewer than a prompt needs in one layer. The count of bytes read is exact."""
    folder, read, reading = saved(family, **settings), [], FileStack.read
    monkeypatch.setattr(FileStack, "read", lambda self, expert, out: (read.append(out.nbytes), reading(self, expert, out)))
    inputs = tiny_inputs(batch=2)
    whole, model = load(folder), load(folder)
    cache = offload_experts(model, 0.18, CPU, folder if on_disk else None)
    for _ in range(2):
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
    written = model.generate(**inputs, **WRITE, return_dict_in_generate=True, output_logits=True)
    expected = whole.generate(**inputs, **WRITE, return_dict_in_generate=True, output_logits=True)
    assert all(torch.equal(got, wanted) for got, wanted in zip(written.logits, expected.logits, strict=True))
    assert len(cache._slots) == 3
    assert cache.counts.misses > 20
    cache._reader.shutdown()
    assert sum(read) == (cache.counts.bytes_read if on_disk else 0)


@torch.no_grad()
def test_the_next_layers_experts_are_prefetched(saved):
    """Routers that send every token to the same two experts, others in each layer: after one pass, nothing but these is fetched, and all
    of it before it is needed."""
    model = load(saved())
    for layer, mlp in enumerate(model.sparse_mlps().values()):
        mlp.router.register_forward_hook(partial(_always, layer))
    cache = offload_experts(model, 0.25, CPU, saved())  # room for 4: one layer's two, and the next one's
    inputs = tiny_inputs()
    model(**inputs)
    model(**inputs)
    first = asdict(cache.counts)
    cache.counts = Counts()
    model(**inputs)
    assert first["misses"] > 0
    assert asdict(cache.counts) == {"hits": 8, "misses": 0, "foreseen": 8, "ahead": 8, "bytes_read": cache.counts.bytes_read}
    expected = {(3, expert) for expert in (3, 0)} | {(0, expert) for expert in (0, 1)}
    assert set(cache._slots) == expected


def _always(layer, _, arguments, output):
    """Return the router's output with other experts."""
    logits, weights, ids, dropped = output
    return logits, weights, torch.tensor([layer, (layer + 1) % 4]).expand_as(ids), dropped


def test_statistics_of_successive_choices():
    """Experts 0 and 1 lead to 2 and 3; in every other pass, 0 to 0."""
    statistics = RouteStatistics(2, 4, 1)
    for step in range(40):
        statistics.observe(0, torch.tensor([[0], [1]]))
        statistics.observe(1, torch.tensor([[2 if step % 2 else 0], [3]]))
    torch.testing.assert_close(statistics.used_LE[0], torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(statistics.follows_LEE[1, :2], torch.tensor([[0.5, 0, 0.5, 0], [0, 0, 0, 1.0]]), atol=0.05, rtol=0)
    statistics.observe(0, torch.tensor([[1], [1]]))
    torch.testing.assert_close(statistics.chances(1), torch.tensor([0.0, 0, 0, 1]), atol=0.05, rtol=0)
    statistics.observe(0, torch.tensor([[0], [0]]))  # either of two tokens may choose 0, and either 2
    torch.testing.assert_close(statistics.chances(1), torch.tensor([0.75, 0, 0.75, 0]), atol=0.05, rtol=0)


@torch.no_grad()
def test_with_slots_for_all_every_expert_is_read_once(saved):
    model = load(saved())
    size = sum(parameter.nbytes for mlp in model.sparse_mlps().values() for parameter in mlp.experts.parameters())
    cache = offload_experts(model, 1.0, CPU, saved())
    for seed in range(6):
        model(**tiny_inputs(seed=seed))
    assert cache.counts.bytes_read == size


def test_loading_leaves_experts_in_their_files(tmp_path):
    """No byte of 50 MB of experts is in memory."""
    config = sparse_config(tiny_config("llama"), MoeOptions(num_experts=8, moe_layers="all"))
    config.text_config.hidden_size, config.text_config.intermediate_size = 128, 1024
    MoeLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    resident = psutil.Process().memory_info().rss
    model = load(tmp_path)
    cache = offload_experts(model, 0.25, CPU, tmp_path)
    assert psutil.Process().memory_info().rss - resident < 15e6
    with torch.no_grad():
        model(**tiny_inputs())
    assert cache.counts.bytes_read == 50_331_648
    assert psutil.Process().memory_info().rss - resident < 30e6


@torch.no_grad()
def test_replaced_files_do_not_matter(saved, tmp_path):
    """A loaded model keeps the weights of the files that it was loaded from."""
    folder = shutil.copytree(saved(), tmp_path / "model")
    whole, model = load(saved()), load(folder)
    offload_experts(model, 0.2, CPU, folder)
    for file in folder.glob("*.safetensors"):
        os.replace(shutil.copy(file.parent / "config.json", tmp_path / "other"), file)
    assert torch.equal(model(**tiny_inputs()).logits, whole(**tiny_inputs()).logits)


@torch.no_grad()
def test_a_failed_read_is_tried_again(tmp_path):
    """A read error reaches the caller, and the slot stays usable: the next call gets the expert."""
    file = tmp_path / "experts"
    values = torch.randn(3, 4)
    file.write_bytes(values.numpy().tobytes()[:-8])
    with file.open("rb") as opened:
        stack = FileStack(StoredTensor(file, (3, 4), torch.float32), opened.fileno())
        cache = ExpertCache([{"weight": stack}], kept=2, experts=3, top_k=1, device=CPU)
        ask = (torch.ones(1), torch.tensor([[2]]), None)
        for _ in range(3):
            cache.expect(0, EAGER, ask)
            with pytest.raises(CheckpointError, match="experts is truncated: it ends 8 bytes before a tensor does"):
                cache.fetched((0, 2))
        file.write_bytes(values.numpy().tobytes())
        for expert in (2, 0, 1):
            cache.expect(0, EAGER, (torch.ones(1), torch.tensor([[expert]]), None))
            assert torch.equal(cache.fetched((0, expert))["weight"], values[expert])


class SlowStack(MemoryStack):
    """A stack that other threads read slowly."""

    begun = threading.Event()

    def read(self, expert, out):
        if threading.current_thread() is not threading.main_thread():
            self.begun.set()
            time.sleep(0.1)
        super().read(expert, out)


@torch.no_grad()
def test_a_slot_that_is_being_filled_is_not_reused():
    """There are two slots, and the first of three experts is still being read when the third is needed."""
    values = torch.randn(3, 16)
    cache = ExpertCache([{"weight": SlowStack(values)}], kept=2, experts=3, top_k=1, device=CPU)
    for expert in range(3):
        cache.expect(0, EAGER, (torch.ones(1), torch.tensor([[expert]]), None))
        assert SlowStack.begun.wait(10)
    weights = cache.fetched((0, 2))["weight"]
    time.sleep(0.2)
    assert torch.equal(weights, values[2])


def test_gradients_saving_and_other_backends_are_refused(saved, tmp_path):
    model = load(saved())
    offload_experts(model, 0.5, CPU, saved())
    with pytest.raises(ValueError, match="have no gradient: load the whole model to train it"):
        model(**tiny_inputs())
    with pytest.raises(ValueError, match="cannot be saved: copy the checkpoint"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match="with the backend eager, not grouped_mm"), torch.no_grad():
        model(**tiny_inputs())


@pytest.mark.parametrize("keep", [0.0625, -1.0, 1.1, float("nan")])
def test_less_than_two_experts_is_refused(saved, keep):
    with pytest.raises(ValueError, match="of 16 experts are to be kept, but 2 to 16 must be"):
        offload_experts(load(saved()), keep, CPU, saved())


def test_a_model_that_differs_from_its_files_is_refused(saved):
    model = load(saved()).to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"the checkpoint must have model.language_model.layers.0.mlp.experts.gate_up_proj as .*bfloat16.* has .*float32"
    ):
        offload_experts(model, 0.5, CPU, saved())


@torch.no_grad()
def test_a_backbone_of_another_name(saved, tmp_path):
    """SmolVLM calls it text_model. A checkpoint without that name is refused, with the name."""
    text = tiny_config("llama").text_config.to_dict() | {"pad_token_id": 0}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    dense = SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=98, scale_factor=2)).eval()
    upcycle(dense).save_pretrained(tmp_path)
    whole, model = (AutoModelForImageTextToText.from_pretrained(tmp_path) for _ in range(2))
    whole.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"the checkpoint has no model.text_model.layers.0.mlp.experts.gate_up_proj, under which name"):
        offload_experts(model, 0.5, CPU, saved())
    offload_experts(model, 0.5, CPU, tmp_path)
    ids = torch.arange(3, 40).view(1, -1)
    assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_adapted_experts_are_refused(saved):
    model = load(saved())
    config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], r=2)
    adapted = peft.get_peft_model(model, config).get_base_model()
    with pytest.raises(ValueError, match="the experts of layer 0 are adapted or quantised"):
        offload_experts(adapted, 0.5, CPU)


def test_shares_and_dense_checkpoints_are_refused_before_loading(saved, tmp_path):
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(CheckpointError, match="must be above 0 and at most 1"):
            check_checkpoint(saved(), keep)
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no experts made by upcycle, of which to keep a share"):
        load_offloaded(tmp_path, 0.5)
