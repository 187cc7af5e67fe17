"""A language model in a GGUF file, as llama.cpp writes it, becomes part of a LLaVA."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moe_llava.checkpoints.gguf import language_folder
from moe_llava.checkpoints.join import join
from moe_llava.common.errors import CheckpointError
from tests.training.test_recipes import parts  # noqa: F401

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
TEXT = "héllo, <|im_start|>world\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))


def random_model() -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, vocab_size=258 + len(SPECIAL), tie_word_embeddings=False)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_gguf(file: Path, model: Qwen2ForCausalLM, without: str = "nothing") -> None:
    """Write float32 weights, and a byte-level tokenizer with two merges."""
    config, writer = model.config, gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(512)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*bytes_to_unicode().values(), "he", "wo", *SPECIAL]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)) + [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e", "w o"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if without not in name:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_it_is_joined_with_a_tower(parts, tmp_path):  # noqa: F811
    """The weights and the tokenizer are those of the file, which is read once."""
    origin, file = random_model(), tmp_path / "tiny.gguf"
    write_gguf(file, origin)
    model, processor = join(str(file), str(parts / "clip"), "chatml", seed=1)
    ids = processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids) == TEXT
    assert ids[-6:] == [259, 257, *processor.tokenizer.convert_tokens_to_ids(["r", "l", "d", "Ċ"])]
    with torch.no_grad():
        expected, found = (each(input_ids=torch.tensor([ids])).logits for each in (origin, model))
    assert torch.equal(found[..., : origin.config.vocab_size], expected)
    folder = Path(language_folder(str(file)))
    assert folder.parent.parent == tmp_path / "cache"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    join(str(file), str(parts / "clip"), "chatml", seed=1)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_files_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"the language model .*none.gguf does not exist"):
        language_folder(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("no weights")
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*text.gguf: "):
        language_folder(str(tmp_path / "text.gguf"))
    write_gguf(tmp_path / "less.gguf", random_model(), without="layers.1.mlp.up_proj")
    with pytest.raises(CheckpointError, match=r"less.gguf does not hold the weights of a Qwen2ForCausalLM: missing .*layers.1.mlp.up_proj"):
        language_folder(str(tmp_path / "less.gguf"))
    assert not list((tmp_path / "cache" / "moe-llava").glob("*/"))
