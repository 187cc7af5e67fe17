"""Metrics of a server."""

import copy
import urllib.request

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from moe_llava.checkpoints.offload import offload_experts
from moe_llava.serving.engine.engine import Engine
from tests.serving.conftest import server
from tests.serving.test_api import client_of, complete, metric, user
from tests.training.conftest import tiny_base  # noqa: F401


def families(url):
    """name -> metric family, as a Prometheus server parses them"""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_metrics_of_two_servers(served):
    """The metrics of one server do not include the requests of another in the same process."""
    model, processor, _ = served
    with (
        server(Engine(model, processor.tokenizer), processor) as url,
        server(Engine(model, processor.tokenizer), processor) as idle,
        client_of(url) as client,
    ):
        usages = [complete(client, [user()]).usage for _ in range(2)]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="another", messages=[user()])
        found = families(url)
        assert {name.removeprefix("moe_llava_"): family.type for name, family in found.items()} == {
            "requests": "counter",
            "requests_running": "gauge",
            "requests_waiting": "gauge",
            "prompt_tokens": "counter",
            "cached_prompt_tokens": "counter",
            "completion_tokens": "counter",
            "time_to_first_token_seconds": "histogram",
        }
        outcomes = {sample.labels["outcome"]: sample.value for sample in found["moe_llava_requests"].samples}
        assert outcomes == {"200": 2, "404": 1}
        assert metric(url, "prompt_tokens_total") == sum(usage.prompt_tokens for usage in usages)
        assert metric(url, "completion_tokens_total") == sum(usage.completion_tokens for usage in usages)
        assert metric(url, "time_to_first_token_seconds_count") == 2
        assert not families(idle)["moe_llava_requests"].samples
        assert metric(idle, "prompt_tokens_total") == 0


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
