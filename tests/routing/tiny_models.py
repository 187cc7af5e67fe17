"""Tiny sparse models, ours and others."""

from moe_llava import upcycle
from tests.conftest import tiny_dense

TEXT_MODEL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_sparse(**settings):
    return upcycle(tiny_dense("llama"), **{"moe_layers": [1, 3], "num_experts": 4, "num_experts_per_tok": 2, **settings}).eval()
