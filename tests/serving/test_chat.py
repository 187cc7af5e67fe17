"""A conversation is one growing prompt; its pieces are its answer."""

import pytest
import torch

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.data.records import DataError
from moe_llava.evaluation.benchmarks import digits_world
from moe_llava.evaluation.generate import prompt_inputs
from moe_llava.serving.chat import Conversation
from tests.training.conftest import tiny_base  # noqa: F401


@pytest.fixture
def parts(tiny_base):  # noqa: F811
    return load_checkpoint(tiny_base / "base", dtype=torch.float32)


def test_pieces_are_the_answer(tiny_base, parts):  # noqa: F811
    model, processor = parts
    question = digits_world.questions(tiny_base / "data")[0]
    expected = model.generate(**prompt_inputs(processor, [question]), max_new_tokens=6, do_sample=False)
    conversation = Conversation(model, processor, max_new_tokens=6)
    conversation.add_image(question.images[0])
    answer = "".join(conversation.ask(question.prompt.removeprefix("<image>")))
    length = prompt_inputs(processor, [question])["input_ids"].shape[1]
    assert answer.strip() == processor.decode(expected[0, length:], skip_special_tokens=True).strip()


def test_later_turns_see_earlier_ones(tiny_base, parts):  # noqa: F811
    conversation = Conversation(*parts, max_new_tokens=3)
    conversation.add_image(tiny_base / "data" / "images" / "test" / "000000.png")
    first = "".join(conversation.ask("where is the red 7 ?"))
    "".join(conversation.ask("how many digits are there ?"))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert conversation.messages[1]["content"][0]["text"] == first.strip()
    kinds = [[part["type"] for part in message["content"]] for message in conversation.messages]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"]]


def test_empty_prompts_and_broken_images_are_refused(tmp_path, parts):
    conversation = Conversation(*parts)
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(conversation.ask("  "))
    with pytest.raises(DataError, match="does not exist"):
        conversation.add_image(tmp_path / "none.png")
    assert conversation.images == []


def test_a_failure_while_generating_is_raised_to_the_caller(parts):
    model, processor = parts
    conversation = Conversation(model, processor, max_new_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(conversation.ask("where is the red 7 ?"))
    assert conversation.messages == []
