"""What a client's messages become, what their images take, and in which order they are prepared."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.client import HTTPConnection

import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessorPil

from moe_llava.common.images import MOST_SIDE
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.prompt import PromptBuilder
from moe_llava.serving.http.bodies import MemoryBudget, Reservation, Worker
from moe_llava.serving.http.prompts import PromptMaker, working_bytes
from moe_llava.serving.http.protocol import ApiError, ImagePart, Limits, Message, TextPart, VideoPart
from tests.conftest import REPOSITORY
from tests.serving.conftest import LIMITS, server
from tests.serving.hostile import PLAIN, PNG, data_url, encoded, flat
from tests.serving.test_api import eventually, metric, post
from tests.serving.test_engine import slowed
from tests.training.conftest import tiny_base  # noqa: F401

CLIP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
INPUTS = 336 * 336 * 3 * 4
PAYLOAD = data_url(PNG).partition(",")[2]


def question(*urls):
    return [Message("user", [*map(ImagePart, urls), TextPart("where is the red 7 ?")])]


@pytest.fixture(scope="module")
def prompts(served):
    return PromptMaker(served[1], LIMITS)


def test_a_video_is_refused_by_a_model_that_takes_none(prompts):
    messages = [Message("user", [VideoPart(f"data:video/mp4;base64,{PAYLOAD}"), TextPart("what happens ?")])]
    with pytest.raises(ApiError, match=r"the request has a video, but the model's .*LlavaProcessor takes no videos"):
        prompts.needs(messages, {})


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;charset=utf-8;base64,",
        "data:image/png;charset=UTF-8;name=a.png;base64,",
        'data:image/png;name="a;b,c.png";base64,',
        "data:image/png; charset=utf-8; base64,",
        "data:image/png;charset=;base64,",
        "data:image/jpg;base64,",
        "data:image/x-png;base64,",
        "data:image/svg+xml;base64,",
        "data:image/vnd.some_thing;base64,",
        "data:image/*;base64,",
        "DATA:IMAGE/PNG;BASE64,",
    ],
)
def test_a_data_url_may_have_parameters(prompts, head):
    """What its content is says the content."""
    found, expected = (prompts.make(question(url), {}) for url in (head + PAYLOAD, data_url(PNG)))
    assert found.input_ids == expected.input_ids
    assert torch.equal(found.inputs["pixel_values"], expected.inputs["pixel_values"])


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png,",
        "data:;base64,",
        "data:text/plain;base64,",
        "data:image/png;base64;charset=utf-8,",
        "data:image/png;charset;base64,",
        "data:image/;base64,",
        " data:image/png;base64,",
        "data:image/png;a=b,c;base64,",
        "image/png;base64,",
    ],
)
def test_what_is_no_data_url(prompts, head):
    with pytest.raises(ApiError, match="image_url must be a data: URL"):
        prompts.needs(question(head + PAYLOAD), {})


def test_many_parameters_take_no_time(prompts):
    with pytest.raises(ApiError, match="must be a data: URL"):
        prompts.needs(question("data:image/png" + ";a=b" * 1_000_000), {})


def test_one_image_at_a_time_is_as_good_as_all(served, prompts):
    _, processor, _ = served
    images = [PLAIN, PLAIN.rotate(90), Image.effect_noise((50, 70), 90)]
    prompt = prompts.make(question(*(data_url(encoded(image)) for image in images)), {})
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}] * 3 + [{"type": "text", "text": "where is the red 7 ?"}]}],
        add_generation_prompt=True,
    )
    expected = processor(text=text, images=[image.convert("RGB") for image in images], add_special_tokens=False, return_tensors="pt")
    assert prompt.input_ids == expected["input_ids"][0].tolist()
    assert torch.equal(prompt.inputs["pixel_values"], expected["pixel_values"])
    needs = prompts.needs(question(*(data_url(encoded(image)) for image in images)), {})
    assert needs.kept == prompt.inputs["pixel_values"].nbytes
    assert needs.working == prompts.needs(question(data_url(encoded(images[2]))), {}).working  # the largest one


@pytest.mark.parametrize(
    ("content", "changed", "why"),
    [
        (flat(300, 200), {"pixels": 59_999}, "300 x 200 pixels, but at most 59999 are allowed"),
        (flat(300, 200), {"all_pixels": 119_999}, "more than 119999 pixels together"),
        (flat(300, 200), {"working_bytes": 1_000_000}, "300 x 200 pixels and needs 1[0-9]* bytes to prepare, but at most 1000000"),
        (flat(603, 3), {}, "603 x 3 pixels, but one side may be at most 200 times"),
        (PNG[:30], {}, "is broken, or none of PNG, JPEG, WEBP, GIF"),
    ],
)
def test_an_image_is_refused_by_its_header(served, content, changed, why):
    """Nothing of its content is read."""
    prompts = PromptMaker(served[1], replace(LIMITS, **changed))
    with pytest.raises(ApiError, match=why) as caught:
        prompts.needs(question(*[data_url(content)] * 2), {})
    assert caught.value.status == 400


def test_whatever_the_limits_let_through_can_be_prepared():
    """With CLIP's preprocessing, and padded to a square."""
    sizes = [(5000, 5000), (6144, 4069), (70_710, 353), (353, 70_710), (25_000, 1000)]
    for pad in (False, True):
        processor = LlavaImageProcessorPil(**CLIP, do_pad=pad)
        assert all(working_bytes(size, True, processor, INPUTS) <= Limits().working_bytes for size in sizes)
    assert (
        working_bytes((200, 1), False, LlavaImageProcessorPil(size={"shortest_edge": 3000}, do_pad=False), INPUTS) > Limits().working_bytes
    )


@pytest.mark.slow
def test_an_image_takes_no_more_than_is_expected():
    """Measured, in a process of its own."""
    # Freed memory goes back to the system at once, and is not taken for that of the next image.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-m", "tests.serving.measured_images"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=200, check=True)
    lines = [(line, *map(int, line.split("|")[2:])) for line in done.stdout.splitlines()]
    assert len(lines) == 20
    assert not [line for line, taken, expected in lines if not expected / 4 < taken < expected * 1.02 + 3e6]


def test_the_smallest_work_comes_first():
    async def order():
        worker, begin, done = Worker(), threading.Event(), []
        running = [asyncio.create_task(worker.run(9, begin.wait))]
        await asyncio.sleep(0.05)
        running += [asyncio.create_task(worker.run(size, lambda size=size: done.append(size))) for size in (5, 3, 4, 1)]
        await asyncio.sleep(0.05)
        running[3].cancel()  # who waited for 4 is gone
        await asyncio.sleep(0.05)
        begin.set()
        await asyncio.gather(*running, return_exceptions=True)
        with pytest.raises(ZeroDivisionError):
            await worker.run(0, lambda: 1 // 0)
        assert await worker.run(0, threading.current_thread) is not threading.current_thread()
        thread = await worker.run(0, threading.current_thread)
        worker.close()
        thread.join(10)
        assert not thread.is_alive()
        return done

    assert asyncio.run(order()) == [1, 3, 5]


def test_reserved_memory_is_released():
    budget = MemoryBudget(100)
    with Reservation(budget) as one, Reservation(budget) as other:
        one.add(60)
        other.add(40)
        with pytest.raises(ApiError, match="all requests together may hold 100 bytes") as caught:
            one.add(1)
        assert caught.value.status == 429
        assert "Retry-After" in caught.value.headers
        one.keep(10)
        other.add(50)
    with Reservation(budget) as third:
        third.add(100)


def test_pixel_values_count_until_they_are_answered(sparse):
    """Room for those of one image and a little more: ten requests, one after another, need no more; two images do."""
    model, processor = sparse
    image = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
    form = PromptBuilder(processor)
    with server(Engine(model, processor.tokenizer), processor, replace(LIMITS, all_bytes=form.image_bytes()(PLAIN.size) + 5000)) as url:

        def status(images=1, path="/v1/chat/completions", **settings):
            messages = [{"role": "user", "content": [image] * images + [{"type": "text", "text": "is this a 7 ?"}]}]
            if path == "/routes":
                messages.append({"role": "assistant", "content": "yes"})
            return post(url, {"model": "tiny", "messages": messages, "max_tokens": 2} | settings, path=path)[0]

        for _ in range(2):
            found = [status(), status(stream=True), status(path="/routes"), status(max_tokens=10**6), status(images=2)]
            assert found == [200, 200, 200, 400, 400]


@pytest.mark.parametrize("stream", [False, True])
def test_pixel_values_count_while_a_completion_runs(sparse, monkeypatch, stream):
    """A second image has no room beside the first one, until the first completion ends or its client disconnects."""
    model, processor = sparse
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    slowed(model, monkeypatch, 0.05)
    image = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [image, {"type": "text", "text": "is this a 7 ?"}]}]}
    running = json.dumps(body | {"max_tokens": 40, "stream": stream})
    limits = replace(LIMITS, all_bytes=PromptBuilder(processor).image_bytes()(PLAIN.size) + 5000)
    with server(Engine(model, processor.tokenizer), processor, limits) as url:
        for disconnects in (True, False):
            connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
            connection.request("POST", "/v1/chat/completions", running, {"Content-Type": "application/json"})
            eventually(lambda: metric(url, "requests_running") == 1)
            assert post(url, body | {"max_tokens": 1})[0] == 429
            if not disconnects:
                assert connection.getresponse().read()
            connection.close()
            eventually(lambda: metric(url, "requests_running") == 0)
            assert post(url, body | {"max_tokens": 1})[0] == 200


def test_the_side_that_is_made_small_is_the_one_that_counts():
    padded = LlavaImageProcessorPil(**CLIP, do_pad=True)
    assert working_bytes((MOST_SIDE, 355), False, padded, INPUTS) > working_bytes((MOST_SIDE // 2, 355), False, padded, INPUTS)
    assert working_bytes((355, MOST_SIDE * 4), False, padded, INPUTS) < Limits().working_bytes
