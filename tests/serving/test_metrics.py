"""What a server tells of a model whose experts are not all in memory."""

import copy

import torch

from moe_llava.checkpoints.offload import offload_experts
from moe_llava.serving.engine.engine import Engine
from tests.serving.conftest import server
from tests.serving.test_api import client_of, complete, metric, user
from tests.training.conftest import tiny_base  # noqa: F401


def test_what_experts_were_fetched(sparse):
    """The answer is the same."""
    whole, processor = sparse
    model = copy.deepcopy(whole)
    cache = offload_experts(model, 0.5, torch.device("cpu"))
    with server(Engine(whole, processor.tokenizer), processor) as url, client_of(url) as client:
        expected = complete(client, [user()]).choices[0].message.content
        assert metric(url, "expert") == 0
    with server(Engine(model, processor.tokenizer), processor, experts=cache.counts) as url, client_of(url) as client:
        assert complete(client, [user()]).choices[0].message.content == expected
        assert (metric(url, "expert_hits_total"), metric(url, "expert_misses_total")) == (cache.counts.hits, cache.counts.misses)
        assert metric(url, "expert_bytes_total") == cache.counts.bytes_read > 0
