"""A vocabulary that is cut to the tokens in use gives the same tokens and the same logits."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moe_llava.common.errors import CheckpointError
from real.vocabulary import cut_vocabulary

CORPUS = [
    "the red apple and the red kite",
    "a green tree under the blue sky",
    "what is this? it is a yellow pear",
    "kites, trees and pears",
] * 3
TEXTS = ["<turn>the red apple\n", "what is this?", "a yellow pear"]


@pytest.fixture
def folder(tmp_path):
    """A BPE of Gemma's kind, with bytes for unknown characters and reserved special tokens, and a tied model."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<turn>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special[:6], show_progress=False))
    state = bpe.get_vocab_size()
    bpe.add_tokens(special[6:])
    assert state < bpe.get_vocab_size()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(tmp_path / "whole")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=bpe.get_vocab_size(), tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def test_tokens_and_logits_are_the_same(folder, tmp_path):
    (whole, before), rows = load(folder), cut_vocabulary(folder, tmp_path / "cut", TEXTS)
    cut, after = load(tmp_path / "cut")
    assert rows == cut.config.vocab_size == len(after) < len(before)
    kept = [before.convert_tokens_to_ids(token) for token, _ in sorted(after.get_vocab().items(), key=lambda item: item[1])]
    assert "<unused0>" not in after.get_vocab()
    assert "pear" in before.get_vocab() or "▁pear" in before.get_vocab()
    for text in TEXTS:
        assert after.tokenize(text) == before.tokenize(text)
        with torch.no_grad():
            expected, found = (
                model(**tokens(text, return_tensors="pt", return_token_type_ids=False)).logits
                for model, tokens in ((whole, before), (cut, after))
            )
        torch.testing.assert_close(found, expected[..., kept])
    assert (cut.config.eos_token_id, cut.config.pad_token_id) == (after.eos_token_id, after.pad_token_id)
    # Another text is still read, in shorter tokens.
    other = "kites under the sky"
    assert len(after.tokenize(other)) > len(before.tokenize(other))
    assert after.decode(after(other)["input_ids"]) == other


def test_what_cannot_be_cut_exactly_is_refused(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"the head of .* is not its embedding"):
        cut_vocabulary(folder, tmp_path / "cut", TEXTS)
    assert not (tmp_path / "cut").exists()
