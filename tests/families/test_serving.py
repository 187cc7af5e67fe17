"""The engine completes prompts of any family as `generate` does."""

import base64
import io
import json
import queue
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from moe_llava import upcycle
from moe_llava.common.errors import DataError
from moe_llava.common.images import InlineImage
from moe_llava.common.videos import Clip, VideoInfo
from moe_llava.data.encode import IGNORE_INDEX
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import parse_record
from moe_llava.data.rendering import make_portable
from moe_llava.data.videos import VideoReader
from moe_llava.model.greedy import end_tokens, write_greedily
from moe_llava.routing.routes import write_routes
from moe_llava.routing.tokens import RoutingError
from moe_llava.serving.chat.conversation import Conversation, Settings
from moe_llava.serving.engine.cache import has_states
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.prompt import PromptBuilder, PromptError
from moe_llava.serving.engine.requests import Prompt, Request
from moe_llava.serving.http.prompts import PromptMaker
from moe_llava.serving.http.protocol import ApiError, ImagePart, Limits, Message, TextPart, VideoPart
from tests.common.test_videos import write_video
from tests.conftest import run_here
from tests.families.native import PROCESSORS, native_model, native_processor
from tests.families.processors import ROWS, tiny_checkpoint, tiny_model, tiny_processor
from tests.families.test_video import draw
from tests.serving.conftest import LIMITS, server
from tests.serving.hostile import data_url, flat
from tests.serving.test_api import post
from tests.vlm import IMAGE, tiny_vlm, vlm_inputs

PICTURES = [Image.new("RGB", size, (60 * number, 200, 90)) for number, size in enumerate(((40, 30), (20, 60), (33, 33)))]


def messages_of(question, images):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


def messages_about(question, media):
    kinds = [{"type": "video" if isinstance(medium, Clip) else "image"} for medium in media]
    return [{"role": "user", "content": [*kinds, {"type": "text", "text": question}]}]


def inline(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return InlineImage("a frame", buffer.getvalue())


def processor_of(family):
    processor = native_processor(family) if family in PROCESSORS else tiny_processor(family)
    processor.chat_template = processor.tokenizer.chat_template = make_portable(
        processor.chat_template, processor.tokenizer, processor.image_token
    )
    return processor


def made(family):
    """(model, processor); the layers have experts"""
    processor = processor_of(family)
    if family in PROCESSORS:
        return native_model(family, processor), processor
    return upcycle(tiny_model(family, processor), num_experts=4, num_experts_per_tok=2), processor


def alone(model, prompt, limit):
    """The tokens that transformers generates, up to an end."""
    ids = torch.tensor([prompt.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.inputs}
    written = write_greedily(model, inputs, limit)[0, ids.shape[1] :].tolist()
    end = next((place for place, token in enumerate(written) if token in end_tokens(model)), len(written))
    return written[: end + 1]


def check_completions(model, processor, prompts):
    """Complete prompts in two slots, so that some join while others are running, and compare with each alone."""
    expected = [alone(model, prompt, 8 + number) for number, prompt in enumerate(prompts)]
    delivered = [queue.Queue() for _ in prompts]
    with Engine(model, processor.tokenizer, slots=2) as engine:
        for number, (prompt, pieces) in enumerate(zip(prompts, delivered, strict=True)):
            engine.submit(Request(prompt, 8 + number), pieces.put)
    for wanted, pieces in zip(expected, delivered, strict=True):
        found = [pieces.get() for _ in range(pieces.qsize())]
        assert not any(isinstance(piece, Exception) for piece in found), found
        assert [piece.token for piece in found] == wanted


@pytest.mark.parametrize("family", sorted(ROWS))
def test_completions_are_those_of_generate(family):
    """Prompts of several lengths, with one image, two and none; some join while others are running."""
    model, processor = made(family)
    builder = PromptBuilder(processor)
    asked = [("What is in the picture?", PICTURES[:1]), ("Compare.", PICTURES[1:]), ("Why?", []), ("Where is the red one?", PICTURES[2:])]
    prompts = [builder.build(messages_of(question, len(images)), images) for question, images in asked]
    check_completions(model, processor, prompts)


def submitted_in_turn(engine, prompts):
    """Of each prompt: how many tokens were reused, those that were generated, and their log probabilities."""
    found = []
    for prompt in prompts:
        delivered = queue.Queue()
        row = engine.submit(Request(prompt, 8, top_logprobs=0), delivered.put)
        while not (pieces := list(delivered.queue)) or not getattr(pieces[-1], "finish_reason", True):
            time.sleep(0.01)
        assert not isinstance(pieces[-1], Exception), pieces
        found.append((row.reused, [piece.token for piece in pieces], [piece.logprobs.logprob for piece in pieces if piece.logprobs]))
    return found


@pytest.mark.parametrize("family", sorted({*ROWS, *PROCESSORS}))
def test_the_beginning_of_a_prompt_is_not_computed_again(family):
    """Another question about an image, the same with another image of this size, and a conversation that goes on."""
    model, processor = made(family)
    builder = PromptBuilder(processor)
    other = Image.new("RGB", PICTURES[0].size, (9, 9, 9))
    questions = [("What is in the picture?", PICTURES[0]), ("Is it red, and where is it?", PICTURES[0]), ("What is in the picture?", other)]
    talks = [messages_of(question, 1) for question, _ in questions]
    talks.append([*talks[0], {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}, *messages_of("Why?", 0)])
    prompts = [builder.build(talk, [image]) for talk, image in zip(talks, [image for _, image in questions] + PICTURES[:1], strict=True)]
    with Engine(model, processor.tokenizer, prefix_bytes=0) as engine:
        expected = submitted_in_turn(engine, prompts)
    with Engine(model, processor.tokenizer) as engine:
        found = submitted_in_turn(engine, prompts)
    for prompt, (_, tokens, logprobs), (_, wanted, wanted_logprobs) in zip(prompts, found, expected, strict=True):
        assert tokens == wanted == alone(model, prompt, 8)
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)
    reused = [False] * 4 if has_states(model.config.get_text_config()) else [False, True, False, True]
    assert [count > 0 for count, _, _ in found] == reused


def test_a_model_whose_text_attends_in_both_directions_reuses_nothing():
    """A token of PaliGemma's prompt attends to all of it, so its states depend on the question."""
    model, image = tiny_vlm("paligemma"), vlm_inputs("paligemma", (1,))
    prompts = [Prompt([*[IMAGE] * 4, 1, *question], {"pixel_values": image["pixel_values"]}) for question in ([5, 6, 7], [8, 9], [5, 6, 7])]
    with Engine(model, made("llava")[1].tokenizer) as engine:
        found = submitted_in_turn(engine, prompts)
    assert [(reused, tokens) for reused, tokens, _ in found] == [(0, alone(model, prompt, 8)) for prompt in prompts]


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "smolvlm"])
def test_completions_about_videos_are_those_of_generate(family):
    """Prompts with a video, with an image and a video, with images and with neither."""
    model, processor = made(family)
    builder = PromptBuilder(processor)
    clip = builder.open_video(tuple(inline(draw(number)) for number in range(5)), "a test")
    asked = [("What happens?", [clip]), ("Compare.", [PICTURES[0], clip]), ("Why?", []), ("Where is the red one?", PICTURES[2:])]
    prompts = [builder.build(messages_about(question, media), media) for question, media in asked]
    text = processor.apply_chat_template(messages_about("What happens?", [clip]), processor.chat_template, add_generation_prompt=True)
    whole = processor(text=[text], **VideoReader(processor).arguments(clip), add_special_tokens=False, return_tensors="pt")
    assert prompts[0].input_ids == whole["input_ids"][0].tolist()
    assert prompts[0].inputs.keys() == whole.keys() - {"input_ids", "attention_mask"}
    assert all(torch.equal(value, torch.as_tensor(whole[name])) for name, value in prompts[0].inputs.items())
    check_completions(model, processor, prompts)


def test_videos_are_refused():
    clip = Clip(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], VideoInfo(2, 1.0, 8, 8))
    for family, message in (("llava", "the model's LlavaProcessor takes no videos"), ("qwen3_vl", "does not render the videos")):
        _, processor = made(family)
        builder = PromptBuilder(processor)
        with pytest.raises(PromptError, match=message):
            builder.build(messages_about("What is <|video_pad|>?", [clip]), [clip])
    builder.build(messages_about(builder.escape("What is <|video_pad|>?"), [clip]), [clip])


def test_a_conversation_about_a_video(tmp_path):
    """It can be saved as a record that has the same prompt, but its routes are not shown."""
    pytest.importorskip("av")
    model, processor = made("qwen3_vl")
    file = write_video(tmp_path / "clip.mp4")
    with Engine(model, processor.tokenizer) as engine:
        conversation = Conversation(engine, processor, Settings(max_new_tokens=4))
        assert conversation.add_video(file).content.info.frames == 10
        "".join(conversation.ask("What happens?"))
        "".join(conversation.ask("And now?"))
        with pytest.raises(RoutingError, match=r"the conversation has the video .*clip.mp4"):
            conversation.trace()
        saved = conversation.record("a model")
        PICTURES[0].save(tmp_path / "0.png")
        conversation.add_images([tmp_path / "0.png"])
        "".join(conversation.ask("And here?"))
        with pytest.raises(ValueError, match="has images or one video, but there are 1 images and 1 videos"):
            conversation.record("a model")
        lengths = [turn.prompt_tokens for turn in conversation.turns]
    assert saved["video"] == str(file)
    record = parse_record("saved", saved, tmp_path)
    length = int((Encoder(processor)(record)["labels"] == IGNORE_INDEX).nonzero().max())
    assert lengths[1] <= length
    with pytest.raises(DataError, match="saved has a video, and where its patches are is not shown"):
        write_routes(tmp_path / "routes", "a model", model, processor, [record], 1, None)


def test_the_commands_take_videos(tmp_path):
    """One question, lines of a pipe, and a saved conversation, which `check` accepts."""
    pytest.importorskip("av")
    folder = tiny_checkpoint("qwen3_vl", tmp_path / "model")
    file = write_video(tmp_path / "clip.mp4")
    done = run_here("chat", folder, "--video", file, "What happens?", "--max-new-tokens", "2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["videos"], found["images"]) == ([str(file)], [])
    assert found["prompt_tokens"] > 30
    lines = [f"/video {file}", "What happens?", f"/save {tmp_path / 'saved.json'}", f"/video {tmp_path / 'gone.mp4'}", "/video"]
    done = run_here("chat", folder, "--max-new-tokens", "2", "--json", stdin="\n".join(lines))
    assert done.exit_code == 1
    assert json.loads(done.stdout)["prompt_tokens"] == found["prompt_tokens"]
    assert "clip.mp4 (48 x 32, 4 of 10 frames)" in done.stderr.replace("\n", "")
    assert "names the video" in done.stderr
    assert "/video needs a file" in done.stderr
    done = run_here("check", tmp_path / "saved.json", "--model", folder, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["videos"] == 1


def video_url(file, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def video_part(url):
    return {"type": "video_url", "video_url": {"url": url}}


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "smolvlm"])
def test_videos_of_requests(family, tmp_path):
    """The server answers as the engine does; the bytes that it reserves are no fewer than the inputs have."""
    pytest.importorskip("av")
    model, processor = made(family)
    file, builder = write_video(tmp_path / "clip.mp4", size=(320, 240)), PromptBuilder(processor)
    question = {"type": "text", "text": "What happens?"}
    body = {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 6,
        "messages": [{"role": "user", "content": [video_part(video_url(file)), question]}],
    }
    clip = builder.open_video(file, "a test")
    prompt = builder.build(messages_about("What happens?", [clip]), [clip])
    maker = PromptMaker(processor, LIMITS)
    needs = maker.needs([Message("user", [VideoPart(video_url(file)), TextPart("What happens?")])], {})
    assert needs.kept >= sum(value.nbytes for name, value in prompt.inputs.items() if not name.endswith("token_type_ids"))
    with server(Engine(model, processor.tokenizer), processor) as url:
        status, _, answer = post(url, body)
        assert status == 200, answer
        found = json.loads(answer)
        assert found["usage"]["prompt_tokens"] == len(prompt.input_ids)
        expected = [token for token in alone(model, prompt, 6) if token not in end_tokens(model)]
        assert found["choices"][0]["message"]["content"] == processor.tokenizer.decode(expected, skip_special_tokens=True)
        messages = [*body["messages"], {"role": "assistant", "content": "A square moves."}]
        status, _, answer = post(url, {"model": "tiny", "messages": messages}, path="/routes")
        assert (status, json.loads(answer)["error"]["param"]) == (400, "messages.0.content.0.video_url")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"pixels": 320 * 240 - 1},
            "content.0.video_url has 10 frames of 320 x 240 pixels, but at most 76799 pixels are allowed in a frame",
        ),
        ({"decoded_pixels": 320 * 240 * 10 - 1}, "but at most 25000000 pixels are allowed in a frame, and 767999 in all"),
        ({"all_pixels": 320 * 240}, "the images have more than 76800 pixels together"),
        ({"working_bytes": 1000}, "bytes to prepare and .* for its inputs, but at most 1000 and"),
        ({"all_bytes": 1000}, "for its inputs, but at most 1000000000 and 1000 are allowed"),
        ({"image_bytes": 100}, "content.0.video_url has more than 100 bytes"),
    ],
)
def test_limits_of_videos(limits, message, tmp_path):
    """All are checked before a frame is decoded."""
    pytest.importorskip("av")
    _, processor = made("qwen3_vl")
    url = video_url(write_video(tmp_path / "clip.mp4", size=(320, 240)))
    with pytest.raises(ApiError, match=message):
        PromptMaker(processor, replace(LIMITS, **limits)).needs([Message("user", [VideoPart(url)])], {})


def test_other_content_than_videos_is_refused(tmp_path):
    pytest.importorskip("av")
    _, processor = made("qwen3_vl")
    maker, file = PromptMaker(processor, LIMITS), write_video(tmp_path / "clip.mp4")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/hostname\n#EXT-X-ENDLIST\n")
    for part, message in (
        (
            VideoPart(video_url(file, "image/png")),
            "content.0.video_url must be a data: URL, data:video/mp4;base64,...; videos are not fetched",
        ),
        (ImagePart(video_url(file)), "content.0.image_url must be a data: URL, data:image/png;base64,...; images are not fetched"),
        (VideoPart("https://example.org/clip.mp4"), "content.0.video_url must be a data: URL"),
        (VideoPart(video_url(tmp_path / "list.m3u8")), "content.0.video_url, which cannot be decoded: "),
        (ImagePart(video_url(file, "image/png")), "content.0.image_url is broken, or none of PNG, JPEG, WEBP, GIF"),
    ):
        with pytest.raises(ApiError, match=re.escape(message)):
            maker.needs([Message("user", [part])], {})
    fetched = {"https://example.org/clip.mp4": file.read_bytes()}
    assert maker.needs([Message("user", [VideoPart("https://example.org/clip.mp4")])], fetched).kept > 0


def test_a_model_whose_states_cannot_be_batched_is_refused():
    model, processor = made("qwen3_5")
    model.config.get_text_config().layer_types = ["linear_attention", "conv"]
    with pytest.raises(ValueError, match="has layers of conv, whose states the engine cannot batch"):
        Engine(model, processor.tokenizer)


@pytest.mark.parametrize("family", [*ROWS, *PROCESSORS])
def test_photographs_have_room_with_released_image_processors(family):
    """Tiny models have tiny sizes. The defaults of transformers' classes are as released, but for Qwen3-VL."""
    processor = processor_of(family)
    released = {"size": {"shortest_edge": 2**16, "longest_edge": 2**24}, "patch_size": 16} if family == "qwen3_vl" else {}
    processor.image_processor = type(processor.image_processor)(**released)
    maker = PromptMaker(processor, Limits())
    for size in ((64, 64), (640, 480), (1920, 1080), (4032, 3024)):
        needs = maker.needs([Message("user", [ImagePart(data_url(flat(*size)))])], {})
        if size < (4032, 3024):
            inputs, _ = Encoder(processor).process([Image.new("RGB", size)])
            # LLaVA-OneVision's model does not see all of its tiles.
            assert needs.kept >= sum(tensor.nbytes for tensor in inputs.values()) * (0.6 if family == "llava_onevision" else 0.9)
