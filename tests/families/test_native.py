"""A vision-language model with experts of its own is traced, evaluated and served; stages do not train it."""

import queue

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.evaluation.ask.generate import answer
from moe_llava.evaluation.score.questions import Question
from moe_llava.routing.trace import trace_answer
from moe_llava.serving.engine.engine import Engine
from moe_llava.serving.engine.prompt import PromptBuilder
from moe_llava.serving.engine.requests import Request
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from tests.families.processors import tiny_model, tiny_processor
from tests.families.test_training import data, write_recipe  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3-VL-MoE with the processor of Qwen3-VL."""
    processor = tiny_processor("qwen3_vl")
    settings = tiny_model("qwen3_vl", processor).config.to_dict()
    text = settings.pop("text_config") | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    for part in (settings, text, settings["vision_config"]):
        part.pop("model_type", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, **settings)
    path = tmp_path_factory.mktemp("native")
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_it_is_served_traced_and_evaluated(folder, tmp_path):
    model, processor = load_checkpoint(folder)
    image = Image.new("RGB", (40, 30), (200, 90, 20))
    image.save(tmp_path / "a.png")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = PromptBuilder(processor).build(messages, [image])
    pieces: queue.Queue = queue.Queue()
    with Engine(model, processor.tokenizer) as engine:
        engine.submit(Request(prompt, 5), pieces.put)
    tokens = [pieces.get().token for _ in range(pieces.qsize())]
    trace = trace_answer(model, processor.tokenizer, prompt.input_ids, tokens, prompt.inputs)
    assert trace.layers == (0, 1, 2, 3)
    assert trace.answer_T.sum() == len(tokens)
    assert trace.places_T3[:, 0].max() == 0
    ((pair,),) = answer(model, processor, [Question("a", "What?", (tmp_path / "a.png",))], 1, 5)
    assert pair[1] == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_it_is_neither_upcycled_nor_trained(folder, write_recipe, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="is sparse already, its layers have experts: it can be traced, evaluated and served as it is"):
        upcycle(load_checkpoint(folder)[0])
    recipe = load_recipe(write_recipe("qwen3_vl", model=str(folder)))
    with pytest.raises(RecipeError, match="Qwen3VLMoeForConditionalGeneration, whose layers have experts of its own"):
        train(recipe, [3], False, Console(quiet=True))
