"""What a prompt has in common with an earlier one is not computed again, and the answer stays what it would be alone."""

import queue
from dataclasses import replace

import pytest
import torch

from moe_llava.evaluation.score.benchmark import Question
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.prefixes import BLOCK, PrefixCache, blocks_of, media_digest
from moe_llava.serving.engine.requests import Prompt
from tests.conftest import FAMILIES
from tests.serving.conftest import ask, held_back, model_of, received, request_of, running, server, watched
from tests.serving.test_api import client_of, complete, image_part, metric, text_part, user
from tests.serving.test_engine import alone, tokens
from tests.training.conftest import tiny_base  # noqa: F401

LONG = "which digit is leftmost ? which digit is rightmost ? how many digits are there in the image ?"


def submitted(engine, request):
    """(the completion, its pieces)"""
    delivered = queue.Queue()
    row = engine.submit(request, delivered.put)
    return row, list(received(delivered))


def logprobs(pieces):
    return [value for piece in pieces for _, value in piece.logprobs.top]


@pytest.fixture
def about(served):
    """A function from (text, the number of an image) to a request."""
    _, processor, about_one = served
    images = sorted(about_one[0].images[0].parent.iterdir())

    def about(text, image, limit=10):
        return request_of(processor, Question("a", f"<image> {text}", (images[image],)), limit)

    assert len(images) > 1
    return about


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_whole_prompts(served, about, family, sparse, monkeypatch):
    """The same image with other questions, the same question with another image, and all of it again; also beyond a sliding window."""
    processor = served[1]
    model = model_of(family, sparse, processor)
    model.generation_config.eos_token_id = None
    if family == "mistral":
        model.config.text_config.sliding_window = 8
    texts = [(LONG, 0), ("is this a red 7 ?", 0), (LONG, 1), (LONG + " why ?", 0), (LONG, 0)]
    asked = [replace(about(text, image), top_logprobs=3) for text, image in texts]
    with Engine(model, processor.tokenizer, prefix_bytes=0) as engine:
        expected = [list(ask(engine, request)) for request in asked]
    assert [tokens(pieces) for pieces in expected] == [alone(model, request) for request in asked]
    passes = watched(model, monkeypatch)
    with Engine(model, processor.tokenizer) as engine:
        found = [submitted(engine, request) for request in asked]
    for (_, pieces), wanted in zip(found, expected, strict=True):
        assert tokens(pieces) == tokens(wanted)
        assert logprobs(pieces) == pytest.approx(logprobs(wanted), abs=1e-4)
    lengths = [len(request.prompt.input_ids) for request in asked]
    reused = [row.reused for row, _ in found]
    head = blocks_of(asked[0].prompt, engine._media)[0].end
    assert reused[:4] == [0, head, 0, head + BLOCK]
    assert lengths[4] - BLOCK <= reused[4] < lengths[4]
    assert passes == [(1, length - old, 0 if old else 1) for length, old in zip(lengths, reused, strict=True)]
    assert logprobs(expected[0]) != pytest.approx(logprobs(expected[2]), abs=1e-3)  # the image counts


@pytest.mark.parametrize("window", [None, 8])
def test_of_those_who_ask_at_once_one_goes_ahead(served, about, window, monkeypatch):
    """Four ask about one image, two about another, and one about none. The rests of their prompts differ in length."""
    processor = served[1]
    model = model_of("mistral", True, processor)
    model.generation_config.eos_token_id = None
    model.config.text_config.sliding_window = window
    about_one = [about(question, 0) for question in ("is this a red 7 ?", "why ?", LONG, "is this a 3 ?")]
    asked = [*about_one, about("why ?", 1), about(LONG, 1), request_of(processor, Question("t", "which digit is leftmost ?"), 8)]
    expected = [alone(model, request) for request in asked]
    passes = watched(model, monkeypatch)
    may_go = held_back(model, monkeypatch)
    with Engine(model, processor.tokenizer, slots=8) as engine:
        first = running(engine, processor)
        answers = [ask(engine, request) for request in asked]
        may_go.set()
        assert [tokens(answer) for answer in answers] == expected
        list(first)
    assert [images for _, _, images in passes].count(2) == 1  # both images in one pass
    assert sum(images for _, _, images in passes) == 2
    assert sum(rows for rows, _, _ in passes) == len(asked) + 1
    rests = [(rows, columns) for rows, columns, images in passes[1:] if not images]
    assert rests == [(4, max(columns for _, columns in rests))] if window is None else len(rests) == 3


def test_what_is_dropped_before_it_is_reused_is_computed(served, about, monkeypatch):
    """Two ask at once about images that are known. Their rests differ in length, and a sliding window is shorter than their prompts, so one
    goes first; what is kept of it takes the place of the other's beginning."""
    processor = served[1]
    model = model_of("mistral", False, processor)
    model.config.text_config.sliding_window = 8
    known = [about("why ?", image) for image in (0, 1)]
    asked = [about(LONG, 1), about("why ?", 0)]
    expected = [alone(model, request) for request in asked]
    may_go = held_back(model, monkeypatch)
    may_go.set()
    with Engine(model, processor.tokenizer) as engine:
        for request in known:
            submitted(engine, request)
        engine._prefixes.limit = engine._prefixes.nbytes
        may_go.clear()
        first = running(engine, processor)
        delivered = [queue.Queue() for _ in asked]
        rows = [engine.submit(request, pieces.put) for request, pieces in zip(asked, delivered, strict=True)]
        may_go.set()
        assert [tokens(received(pieces)) for pieces in delivered] == expected
        list(first)
    assert [row.reused > 0 for row in rows] == [True, False]


def test_without_room_for_a_beginning_none_goes_ahead(served, about, monkeypatch):
    """Those who ask about one image are prefilled together, as without a prefix cache."""
    model, processor, _ = served
    asked = [about(question, 0) for question in ("is this a red 7 ?", "why ?", LONG, "is this a 3 ?")]
    expected = [alone(model, request) for request in asked]
    passes = watched(model, monkeypatch)
    may_go = held_back(model, monkeypatch)
    may_go.set()
    with Engine(model, processor.tokenizer, prefix_bytes=1000) as engine:
        submitted(engine, asked[0])
        may_go.clear()
        first = running(engine, processor)
        answers = [ask(engine, request) for request in asked]
        may_go.set()
        assert [tokens(answer) for answer in answers] == expected
        list(first)
    assert [images for _, _, images in passes if images][:2] == [1, 4]


def test_a_conversation_goes_on(served, about):
    """The next turn begins with the last one."""
    model, processor, _ = served
    first = about(LONG, 0)
    with Engine(model, processor.tokenizer) as engine:
        _, answer = submitted(engine, first)
        more = [*first.prompt.input_ids, *tokens(answer), *first.prompt.input_ids[-8:]]
        second = replace(first, prompt=Prompt(more, first.prompt.inputs))
        row, found = submitted(engine, second)
    assert tokens(found) == alone(model, second)
    assert row.reused > len(first.prompt.input_ids) - BLOCK


def test_memory_is_bounded(served, about):
    """What was not used for the longest time goes; what is larger than all memory is not kept; without memory nothing is."""
    model, processor, _ = served
    asked = [about("why ?", 0), about("why ?", 1)]
    with Engine(model, processor.tokenizer) as engine:
        for request in asked:
            submitted(engine, request)
        both = engine._prefixes.nbytes
    assert both == 2 * blocks_of(asked[0].prompt, engine._media)[0].end * sum(heads * width for heads, width in engine._shapes) * 4
    for limit, reused in ((both, [True, True]), (both // 2, [False, False]), (both // 2 - 1, [False, False]), (0, [False, False])):
        with Engine(model, processor.tokenizer, prefix_bytes=limit) as engine:
            rows = [submitted(engine, request)[0] for request in asked * 2]
            assert [row.reused > 0 for row in rows] == [False, False, *reused]
            assert [row.tokens for row in rows] == [alone(model, request) for request in asked * 2]
            assert limit == 0 or engine._prefixes.nbytes <= limit


def test_the_end_of_a_prompt_is_dropped_before_its_beginning():
    def blocks(*ids):
        return blocks_of(Prompt(list(ids)), frozenset())

    one, other = blocks(*range(3 * BLOCK + 1)), blocks(*range(100, 100 + BLOCK + 1))
    cache = PrefixCache(3 * BLOCK * 4)
    cache.keep(one, lambda tokens: torch.arange(tokens.start, tokens.stop).float()[:, None])
    assert cache.known(one) == 3 * BLOCK
    assert torch.equal(cache.take(one, 20)[:, 0], torch.arange(20.0))
    cache.keep(other, lambda tokens: torch.zeros(BLOCK, 1))
    assert (cache.known(one), cache.known(other), cache.nbytes) == (2 * BLOCK, BLOCK, cache.limit)
    assert cache.fitting(blocks(*range(9 * BLOCK))) == blocks(*range(9 * BLOCK))[:3]


def test_new_blocks_are_copied_together():
    """One query for all of them. Each has memory of its own, so that a dropped one frees it."""
    blocks = blocks_of(Prompt(list(range(5 * BLOCK))), frozenset())
    queries = []

    def states_of(tokens):
        queries.append(tokens)
        return torch.arange(tokens.start, tokens.stop).float()[:, None]

    cache = PrefixCache(100 * BLOCK * 4)
    cache.keep(blocks[:1], states_of)
    cache.keep(blocks, states_of)
    cache.keep(blocks, states_of)
    assert queries == [slice(0, BLOCK), slice(BLOCK, 4 * BLOCK)]
    assert torch.equal(cache.take(blocks, 4 * BLOCK)[:, 0], torch.arange(4.0 * BLOCK))
    assert [states.untyped_storage().nbytes() for states in cache._states.values()] == [BLOCK * 4] * 4


def test_a_block_is_known_by_all_before_it():
    """Tokens, images and their shapes; token types follow from the tokens."""
    ids, pixels = list(range(40)), torch.zeros(1, 3, 4, 4)

    def keys(ids, **inputs):
        return [block.key for block in blocks_of(Prompt(ids, inputs), {7})]

    base = keys(ids, pixel_values=pixels)
    assert [block.end for block in blocks_of(Prompt(ids), {7})] == [8, 24]
    assert keys(ids, pixel_values=pixels, token_type_ids=torch.ones(1, 40)) == base
    others = [keys(ids), keys(ids, pixel_values=pixels + 1), keys(ids, pixel_values=pixels.view(1, 3, 2, 8))]
    others.append(keys([1, *ids[1:]], pixel_values=pixels))
    assert not {key for other in others for key in other} & set(base)
    assert keys([*ids[:10], 0, *ids[11:]], pixel_values=pixels)[0] == base[0]
    assert keys(ids[:8]) == keys(ids[:5]) == []
    halves = pixels.bfloat16()
    assert keys(ids, pixel_values=halves) != base
    known = Prompt(ids, {"pixel_values": pixels}, media_digest({"pixel_values": pixels}))
    assert [block.key for block in blocks_of(known, {7})] == base


def test_a_model_with_a_capacity_has_none(served, about):
    """The tokens of a batch share it, so what is computed alone is another answer."""
    model = model_of("llama", True, served[1])
    model.config.capacity_factor = 1.5
    with Engine(model, served[1].tokenizer) as engine:
        assert [submitted(engine, about(LONG, 0))[0].reused for _ in range(2)] == [0, 0]


def test_clients_are_told(served):
    model, processor, _ = served
    with server(Engine(model, processor.tokenizer), processor) as url, client_of(url) as client:
        usages = [complete(client, [user([image_part(), text_part(text)])]).usage for text in ("why ?", "where is the 7 ?")]
        cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
        assert cached[0] == 0
        assert 36 < cached[1] < usages[1].prompt_tokens
        assert metric(url, "cached_prompt_tokens_total") == sum(cached)
