"""A conversation is one growing prompt; what is kept of it is what was written."""

import itertools
import json

import pytest
import torch

from moe_llava.common.errors import DataError
from moe_llava.data.store import load_records
from moe_llava.evaluation.ask.generate import prompt_inputs
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.model.greedy import write_greedily
from moe_llava.routing.tokens import RoutingError
from moe_llava.routing.trace import trace_routing
from moe_llava.serving.chat.conversation import Conversation, Settings
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.prompt import PromptError
from moe_llava.serving.engine.requests import Request, RequestError
from tests.serving.conftest import ask, model_of
from tests.training.conftest import tiny_base  # noqa: F401

ASKED = "where is the red 7 ?"


@pytest.fixture
def begin(served):
    """A conversation with a sparse model, or another; `settings` are those of Settings."""
    engines = []

    def begin(model=None, **settings):
        engines.append(Engine(model or model_of("llama", True, served[1]), served[1].tokenizer, slots=1))
        return Conversation(engines[-1], served[1], Settings(**settings))

    yield begin
    for engine in engines:
        engine.close()


@pytest.fixture
def images(tiny_base):  # noqa: F811
    return sorted((tiny_base / "data" / "images" / "test").iterdir())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_pieces_are_the_answer_that_generate_writes(tiny_base, served, begin, sparse):  # noqa: F811
    _, processor, _ = served
    question = digits_world.questions(tiny_base / "data")[0]
    model = model_of("llama", sparse, processor)
    inputs = prompt_inputs(processor, [question])
    expected = write_greedily(model, inputs, 6)[0, inputs["input_ids"].shape[1] :]
    conversation = begin(model, max_new_tokens=6)
    conversation.add_images(question.images)
    pieces = list(conversation.ask(question.prompt.removeprefix("<image>")))
    (turn,) = conversation.turns
    assert torch.equal(torch.tensor(turn.tokens), expected)
    assert turn.answer == "".join(pieces).strip() == processor.decode(expected, skip_special_tokens=True).strip()
    assert len(pieces) > 2
    assert (turn.finish_reason, turn.prompt_tokens) == ("length", inputs["input_ids"].shape[1])


def test_later_turns_see_earlier_ones(served, begin, images):
    """Pictures, too: as if all had been one prompt."""
    conversation = begin(max_new_tokens=3, system="be brief")
    for asked, new in ((ASKED, images[:1]), ("how many digits are there ?", []), ("here ?", images[1:2])):
        conversation.add_images(new)
        list(conversation.ask(asked))
    assert [len(turn.media) for turn in conversation.turns] == [1, 0, 1]
    first, second, third = (turn.prompt_tokens for turn in conversation.turns)
    record = conversation.record("model")
    assert [message["role"] for message in record["messages"]] == ["system", *["user", "assistant"] * 3]
    prompt = served[1].apply_chat_template(record["messages"][:-1], add_generation_prompt=True)
    whole = served[1](text=prompt, images=[image.content for image in conversation.images()], add_special_tokens=False)
    assert first < second < third == len(whole["input_ids"][0])


def test_what_cannot_be_asked_changes_nothing(tmp_path, begin, images):
    conversation = begin()
    with pytest.raises(ValueError, match="the prompt is empty"):
        conversation.ask("  ")
    with pytest.raises(DataError, match="the prompt holds half of a character"):
        conversation.ask("where \udcff")
    with pytest.raises(DataError, match="does not exist"):
        conversation.add_images([images[0], tmp_path / "none.png"])
    assert conversation.pending == ()
    for unbegun in (conversation.regenerate, conversation.trace, lambda: conversation.record("model")):
        with pytest.raises(ValueError, match="there is no question yet"):
            unbegun()
    conversation.add_images(images[:1])
    with pytest.raises(RequestError, match=r"the prompt has \d+ tokens and leaves no room for an answer in the model's context of 128"):
        list(conversation.ask("where " * 120))
    assert (conversation.turns, len(conversation.pending)) == ([], 1)


def test_a_failure_while_generating_is_raised_to_the_caller(served, begin, monkeypatch):
    model = model_of("llama", True, served[1])
    conversation = begin(model, max_new_tokens=3)

    def fail(**inputs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(conversation.ask(ASKED))
    assert conversation.turns == []
    assert list(conversation.ask(ASKED))


def test_an_answer_without_a_limit_is_as_long_as_there_is_room(served, begin):
    model = model_of("llama", True, served[1])
    model.generation_config.eos_token_id = None
    conversation = begin(model)
    list(conversation.ask(ASKED))
    (turn,) = conversation.turns
    assert turn.prompt_tokens + len(turn.tokens) == 128


def test_a_seed_is_that_of_the_first_answer(served, begin):
    tokens = {}
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        conversation = begin(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed)
        list(conversation.ask(ASKED))
        tokens[name] = conversation.turns[0].tokens
    assert tokens["one"] == tokens["again"] != tokens["other"]
    prompt = conversation._prompt([], conversation.turns[0])
    direct = ask(conversation.engine, Request(prompt, 12, temperature=1.0, top_p=0.9, seed=7))
    assert tuple(piece.token for piece in direct) == tokens["one"]
    list(conversation.regenerate())
    assert conversation.turns[0].tokens != tokens["other"]


def test_words_that_the_model_does_not_know(begin):
    conversation = begin()
    assert conversation.unknown_words("Is there a red thing? A pink thing? Elephants?") == ["thing", "Elephants"]
    assert conversation.unknown_words("is there a red 7 ?") == []


def test_a_placeholder_that_was_typed_is_text(begin):
    conversation = begin(max_new_tokens=2)
    list(conversation.ask("<image> where ?"))
    assert conversation.record("model")["messages"][0]["content"] == [{"type": "text", "text": "< image> where ?"}]
    conversation._builder.escape = str
    with pytest.raises(PromptError, match="does not render the images"):
        list(conversation.ask("<image> where ?"))


@pytest.mark.parametrize("template", ["{{ raise_exception('no users') }}", "{{ 'user: ' + messages[0]['content'] }}"])
def test_a_template_that_refuses_a_question_is_named(served, begin, monkeypatch, template):
    monkeypatch.setattr(served[1], "chat_template", template)
    conversation = begin(max_new_tokens=2)
    with pytest.raises(PromptError, match=r"the model's chat template refuses them: (no users|can only concatenate str)"):
        list(conversation.ask(ASKED))
    assert conversation.turns == []


def test_what_was_written_until_the_stop_is_a_turn(served, begin, images):
    model = model_of("llama", True, served[1])
    model.generation_config.eos_token_id = None
    conversation = begin(model, max_new_tokens=60)
    conversation.add_images(images[:1])
    writing = conversation.ask(ASKED)
    text = "".join(itertools.islice(writing, 3))
    writing.close()
    (turn,) = conversation.turns
    assert (turn.finish_reason, turn.answer, conversation.pending) == ("interrupted", text.strip(), ())
    whole = "".join(conversation.regenerate())
    assert whole.startswith(text)
    assert len(whole) > len(text)
    assert [turn.finish_reason for turn in conversation.turns] == ["length"]


def test_of_a_stop_before_the_first_word_nothing_is_left(served, begin, images, monkeypatch):
    conversation = begin(max_new_tokens=5)
    conversation.add_images(images[:1])

    class Stopped:
        def put(self, piece):
            """Nothing comes before the stop."""

        def get(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moe_llava.serving.chat.conversation.SimpleQueue", Stopped)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.ask(ASKED))
    assert (conversation.turns, len(conversation.pending)) == ([], 1)
    list(conversation.ask(ASKED))
    assert len(conversation.turns[0].media) == 1


def test_answering_once_more_takes_the_same_pictures(begin, images):
    conversation = begin(max_new_tokens=4)
    conversation.add_images(images[:1])
    list(conversation.ask(ASKED))
    (first,) = conversation.turns
    conversation.add_images(images[:1])  # for the next question
    list(conversation.regenerate())
    (second,) = conversation.turns
    assert (second.tokens, second.prompt_tokens, second.media) == (first.tokens, first.prompt_tokens, first.media)
    assert len(conversation.pending) == 1


def test_routes_are_those_of_the_answer(served, begin, images):
    """As they were while it was written."""
    conversation = begin(max_new_tokens=6)
    conversation.add_images(images[:2])
    list(conversation.ask(ASKED))
    trace = conversation.trace()
    prompt = conversation._prompt([], conversation.turns[0])
    inputs = {"input_ids": torch.tensor([prompt.input_ids]), **prompt.inputs}
    written = trace_routing(conversation.engine.model, inputs, served[1].tokenizer, max_new_tokens=6)
    read = slice(0, len(written.token_ids_T))  # a model does not read the last token that it writes
    assert torch.equal(trace.token_ids_T[read], written.token_ids_T)
    assert torch.equal(trace.answer_T[read], written.answer_T)
    assert torch.equal(trace.ids_LTK[:, read], written.ids_LTK)
    assert torch.equal(trace.places_T3[read], written.places_T3)
    assert trace.answer_T.sum() == 6
    assert int(trace.places_T3[:, 0].max()) == 1


def test_a_dense_model_has_no_routes(served, begin):
    conversation = begin(model_of("llama", False, served[1]), max_new_tokens=2)
    list(conversation.ask(ASKED))
    with pytest.raises(RoutingError, match="has no routers: it is dense"):
        conversation.trace()


def test_a_record_is_one_of_a_data_file(begin, images, tmp_path):
    conversation = begin(max_new_tokens=4)
    conversation.add_images(images[:2])
    list(conversation.ask("is <image> a 7 ?"))
    list(conversation.ask(ASKED))
    file = tmp_path / "said.json"
    file.write_text(json.dumps([conversation.record("model")]))
    (record,) = load_records(file, tmp_path)
    assert record.images == tuple(images[:2])
    assert record.turns == (
        ("<image>\n<image>\nis < image> a 7 ?", conversation.turns[0].answer),
        (ASKED, conversation.turns[1].answer),
    )
