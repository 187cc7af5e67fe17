"""Write the cases for an engine: checkpoints of tiny models, and for each 25 prompts with an image and the tokens that `generate` returns.

    python -m benchmarks.engines.cases OUT

A case is a folder `OUT/NAME` with the checkpoint, and `cases.json` with the prompts. `vllm_cases.py` runs them in vLLM's environment.
"""

from __future__ import annotations

from tests.families import operators  # noqa: F401  before transformers is imported

# isort: split
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from moe_llava import upcycle
from moe_llava.checkpoints.native import export_native
from moe_llava.checkpoints.processors import dense_processor, sparse_processor
from moe_llava.digits.base import build_base
from moe_llava.digits.questions import sample_questions
from moe_llava.digits.scenes import render, sample_scene
from tests.families.processors import tiny_model, tiny_processor

PROMPTS, NEW_TOKENS = 25, 12
TEXT_ONLY = "-text"  # names of cases whose prompts have no image end so
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
Case = tuple[Any, Any]  # model, processor


def digits(**options: Any) -> Case:
    """Return the included model, with experts that differ."""
    dense, processor = build_base()
    return upcycle(dense, expert_start="noise", **options), sparse_processor(processor)


def llava(text: Callable[..., PreTrainedConfig], **options: Any) -> Case:
    """Return a random LLaVA with another language model behind the included tower."""
    base, processor = build_base()
    config = LlavaConfig(
        vision_config=base.config.vision_config,
        text_config=text(vocab_size=base.config.text_config.vocab_size, initializer_range=0.2, **SIZES),
        image_token_index=base.config.image_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    dense = LlavaForConditionalGeneration(config).eval()
    dense.model.vision_tower.load_state_dict(base.model.vision_tower.state_dict())
    dense.generation_config = base.generation_config
    return upcycle(dense, expert_start="noise", **options), sparse_processor(processor)


def family(name: str, **options: Any) -> Case:
    """Return a sparse model of a family with a tiny processor of its own class."""
    dense, processor = dense_family(name)
    return upcycle(dense, expert_start="noise", **options), processor


@torch.no_grad()
def dense_family(name: str) -> Case:
    """Return a random model of a family."""
    processor = tiny_processor(name)
    config = tiny_model(name, processor).config
    text = config.get_text_config()
    # vLLM's attention on CPUs wants heads of 32 or more. Without the field, a head is as wide as its share of the model, which is 32.
    heads = 2 if "head_dim" in {f.name for f in fields(text)} else 1
    text.head_dim, text.num_attention_heads, text.num_key_value_heads = 32, heads, heads
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters["mrope_section"] = [8, 4, 4]
    torch.manual_seed(0)
    dense = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in dense.parameters():
        parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return dense, processor


def native(case: Case, every_layer: bool = False) -> Case:
    """Return a case, exported."""
    return export_native(case[0], every_layer), dense_processor(case[1])


CASES: dict[str, Callable[[], Case]] = {
    "llama": digits,
    "llama-residual": lambda: digits(use_residual=True),
    "llama-unnormalised": lambda: digits(norm_topk_prob=False),
    "llama-smoes": lambda: digits(routing="smoes", num_experts=4),
    "llama-modality_split": lambda: llava(LlamaConfig, routing="modality_split"),
    "phi": lambda: llava(PhiConfig),
    "stablelm": lambda: llava(StableLmConfig),
    "qwen2": lambda: llava(Qwen2Config),
    "qwen3": lambda: llava(Qwen3Config),
    "gemma3": lambda: family("gemma3"),
    "qwen3_vl": lambda: family("qwen3_vl"),
    "gemma3-text": lambda: family("gemma3"),
    "gemma3-dense": lambda: dense_family("gemma3"),
    "qwen3_vl-text": lambda: family("qwen3_vl"),
    "qwen3_vl-dense": lambda: dense_family("qwen3_vl"),
    **{
        name: partial(family, name)
        for name in (
            "aya_vision",
            "cohere2_vision",
            "gemma4",
            "glm4v",
            "idefics3",
            "internvl",
            "llava_next",
            "llava_onevision",
            "mistral3",
            "qwen2_5_vl",
            "qwen3_5",
            "smolvlm",
            "vipllava",
        )
    },
    "native-qwen2_moe": lambda: native(llava(Qwen2Config)),
    "native-qwen2_moe-llama": lambda: native(digits()),
    "native-mixtral": lambda: native(digits(), every_layer=True),
    "native-qwen3_moe": lambda: native(llava(Qwen3Config)),
    "native-qwen3_vl_moe": lambda: native(family("qwen3_vl")),
    "native-every_layer": lambda: native(family("qwen3_vl"), every_layer=True),
}


def questions(seed: int = 0) -> Iterator[tuple[Any, str]]:
    """Yield pictures with a question each."""
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng)
        for question in sample_questions(scene, rng, 1):
            yield render(scene, rng, "test"), question.text


@torch.no_grad()
def write_case(name: str, out: Path) -> None:
    model, processor = CASES[name]()
    folder = out / name
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    suppressed = list(model.generation_config.suppress_tokens or [])
    prompts = []
    for number, (picture, question) in zip(range(PROMPTS), questions(), strict=False):
        if not isinstance(processor, LlavaProcessor):  # 64 is a multiple of all patches; the included tower takes pictures as they are
            picture = picture.resize((64, 64))  # vLLM, llama.cpp and Pillow resize differently
        pictures = [] if name.endswith(TEXT_ONLY) else [picture]
        message = {"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
        done = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True)
        tokens = done.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = [float(scores[0].log_softmax(-1)[token]) for scores, token in zip(done.logits, tokens, strict=True)]
        files = [f"{number}.png" for _ in pictures]
        for file in files:
            picture.save(folder / file)
        logits = done.logits[0][0].tolist()  # before the first token
        prompts.append({"text": text, "question": question, "images": files, "tokens": tokens, "logprobs": logprobs, "logits": logits})
    content = {"new_tokens": NEW_TOKENS, "suppressed": suppressed, "prompts": prompts}
    (folder / "cases.json").write_text(json.dumps(content))
    print(f"{name}: {type(model).__name__}, {len({tuple(prompt['tokens']) for prompt in prompts})} different answers")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        write_case(name, out)
