"""The processors of several families with small images and a small tokenizer: their own classes, their special tokens, and chat templates
that render what theirs render.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.vlm import END, IMAGE, START, VIDEO, tiny_vlm

STARTS = ("<|vision_start|>", "<start_of_image>", "<|image>", "<|begin_of_image|>", "<|IMAGE_START|>", "<pad>")
ENDS = ("<|vision_end|>", "<end_of_image>", "<image|>", "<|end_of_image|>", "<|IMAGE_END|>", "<pad>")
TEXT = "What is in the picture? A red square and a blue circle.\n\nUser: Assistant: Here is the original image and here are some crops " * 3


def rendered(question: str, answer: str, image: str, before: str = "", prompt: str = "", video: str = "") -> str:
    """Return a chat template. `question` and `answer` are Jinja expressions of `content`; `image` and `video` are what a part with one
    becomes; `prompt` is what a generation starts after."""
    return (
        f"{{%- macro text(content) -%}}{{%- if content is string -%}}{{{{- content -}}}}{{%- else -%}}{{%- for part in content -%}}"
        f"{{%- if part.type == 'image' -%}}{{{{- {image!r} -}}}}{{%- elif part.type == 'video' -%}}{{{{- {video!r} -}}}}"
        f"{{%- else -%}}{{{{- part.text -}}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}{{%- endmacro -%}}"
        f"{{{{- {before!r} -}}}}{{%- for message in messages -%}}{{%- set content = text(message.content) -%}}"
        f"{{%- if message.role == 'assistant' -%}}{{{{- {answer} -}}}}{{%- else -%}}{{{{- {question} -}}}}{{%- endif -%}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{- {prompt!r} -}}}}{{%- endif -%}}"
    )


def chatml(image: str, video: str = "") -> str:
    turn = "'<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n'"
    return rendered(turn, turn, image, prompt="<|im_start|>assistant\n", video=video)


CHATML = ("<|im_start|>", "<|im_end|>")
GEMMA = rendered(
    "'<start_of_turn>user\n' + content + '<end_of_turn>\n'",
    "'<start_of_turn>model\n' + content + '<end_of_turn>\n'",
    "<start_of_image>",
    "<bos>",
    "<start_of_turn>model\n",
)
GEMMA_4 = rendered(
    "'<|turn>user\n' + content + '<turn|>\n'",
    "'<|turn>model\n' + content + '<turn|>\n'",
    "<|image|>",
    "<bos>",
    "<|turn>model\n",
    "<|video|>",
)
SMOL = rendered(
    "'User:' + content + '<end_of_utterance>\n'",
    "'Assistant: ' + content + '<end_of_utterance>\n'",
    "<image>",
    "<|im_start|>",
    "Assistant:",
    "<video>",
)
MISTRAL = rendered("'[INST]' + content + '[/INST]'", "content + '</s>'", "[IMG]", "<s>")
COHERE = rendered(
    "'<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content + '<|END_OF_TURN_TOKEN|>'",
    "'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content + '<|END_OF_TURN_TOKEN|>'",
    "<image>",
    "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)
GLM = rendered(
    "'<|user|>\n' + content",
    "'<|assistant|>\n' + content",
    "<|begin_of_image|><|image|><|end_of_image|>",
    "[gMASK]<sop>",
    "<|assistant|>\n",
    "<|begin_of_video|><|video|><|end_of_video|>",
)
COHERE_TOKENS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")


@dataclass(frozen=True)
class Row:
    """`processor`: the class. `images`, `videos`: (class, settings) of the parts. `tokens`: special tokens, `named` those that the
    processor reads from the tokenizer. `first`: the token that begins a text, if the template writes one."""

    processor: str
    images: tuple[str, dict[str, Any]]
    template: str
    tokens: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)
    first: str | None = None
    videos: tuple[str, dict[str, Any]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


QWEN_TOKENS = (*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN = chatml("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
PATCHES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}}
LLAVA = rendered("'USER: ' + content + ' '", "'ASSISTANT: ' + content + '</s>'", "<image>\n", "", "ASSISTANT:")
SMALL = {"size": {"height": 16, "width": 16}}
CLIP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
TILES = {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]}
SMOL_TOKENS = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>")
SMOL_TOKENS += tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
SMOL_IMAGES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
OVIS = ("<image>", "<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
AYA = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL")

ROWS = {
    "llava": Row(
        "LlavaProcessor",
        ("LlavaImageProcessor", CLIP),
        LLAVA,
        ("<image>",),
        settings={"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_next": Row(
        "LlavaNextProcessor",
        ("LlavaNextImageProcessor", CLIP | TILES),
        LLAVA,
        ("<image>",),
        settings={"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": Row(
        "LlavaOnevisionProcessor",
        ("LlavaOnevisionImageProcessor", SMALL | TILES),
        chatml("<image>\n", "<video>\n"),
        (*CHATML, "<image>", "<video>"),
        videos=("LlavaOnevisionVideoProcessor", SMALL),
        settings={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_5_vl": Row(
        "Qwen2_5_VLProcessor", ("Qwen2VLImageProcessor", PATCHES), QWEN, QWEN_TOKENS, videos=("Qwen2VLVideoProcessor", PATCHES)
    ),
    "qwen3_vl": Row("Qwen3VLProcessor", ("Qwen2VLImageProcessor", PATCHES), QWEN, QWEN_TOKENS, videos=("Qwen3VLVideoProcessor", PATCHES)),
    "gemma3": Row(
        "Gemma3Processor",
        ("Gemma3ImageProcessor", SMALL),
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "<bos>",
        settings={"image_seq_length": 4},
    ),
    "gemma4": Row(
        "Gemma4Processor",
        ("Gemma4ImageProcessor", {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
        GEMMA_4,
        ("<|turn>", "<turn|>"),
        {
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        "<bos>",
        videos=("Gemma4VideoProcessor", {}),
    ),
    "smolvlm": Row(
        "SmolVLMProcessor",
        ("SmolVLMImageProcessor", SMOL_IMAGES),
        SMOL,
        SMOL_TOKENS,
        first="<|im_start|>",
        videos=("SmolVLMVideoProcessor", {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}, "num_frames": 8, "fps": 1}),
        settings={"image_seq_len": 4},
    ),
    "idefics3": Row(
        "Idefics3Processor",
        ("Idefics3ImageProcessor", SMOL_IMAGES),
        SMOL,
        SMOL_TOKENS,
        first="<|im_start|>",
        settings={"image_seq_len": 4},
    ),
    "internvl": Row(
        "InternVLProcessor",
        ("GotOcr2ImageProcessor", SMALL | {"crop_to_patches": True, "max_patches": 4}),
        chatml("<IMG_CONTEXT>\n", "<video>\n"),
        CHATML,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        videos=("InternVLVideoProcessor", SMALL),
        settings={"image_seq_length": 4},
    ),
    "mistral3": Row(
        "PixtralProcessor",
        ("PixtralImageProcessor", {"size": {"longest_edge": 16}, "patch_size": {"height": 4, "width": 4}}),
        MISTRAL,
        ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        first="<s>",
        settings={"patch_size": 4, "spatial_merge_size": 2},
    ),
    "aya_vision": Row(
        "AyaVisionProcessor",
        ("GotOcr2ImageProcessor", SMALL | {"crop_to_patches": True, "max_patches": 4}),
        COHERE,
        (*COHERE_TOKENS, *AYA, *(f"TILE_{number}" for number in range(1, 5))),
        first="<BOS_TOKEN>",
        settings={"patch_size": 4, "img_size": 16, "downsample_factor": 2},
    ),
    "cohere2_vision": Row(
        "Cohere2VisionProcessor",
        ("Cohere2VisionImageProcessor", SMALL | {"patch_size": 2, "max_patches": 4}),
        COHERE.replace("<image>", "<|IMG_PATCH|>"),
        COHERE_TOKENS,
        {
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        "<BOS_TOKEN>",
    ),
    "glm4v": Row(
        "Glm4vProcessor",
        ("Glm4vImageProcessor", PATCHES),
        GLM,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|video|>"),
        videos=("Glm4vVideoProcessor", PATCHES),
    ),
    "ovis2": Row(
        "Ovis2Processor",
        ("Ovis2ImageProcessor", SMALL | {"max_patches": 4}),
        chatml("<image>\n"),
        (*CHATML, *OVIS),
        settings={"image_seq_length": 4},
    ),
}
ROWS["qwen3_5"] = ROWS["qwen3_vl"]
ROWS["vipllava"] = ROWS["llava"]


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def tiny_processor(family: str) -> Any:
    """Return the processor of `family`."""
    return made_processor(ROWS[family])


def made_processor(row: Row) -> Any:
    """Return the processor that a row describes."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=row.first or "<bos>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=row.named,
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(row.tokens)})
    parts = {"image_processor": _made(row.images), "tokenizer": tokenizer}
    if row.videos:
        parts["video_processor"] = _made(row.videos)
    if row.processor == "Gemma4Processor":
        parts["feature_extractor"] = transformers.Gemma4AudioFeatureExtractor()
    return getattr(transformers, row.processor)(**parts, chat_template=row.template, **row.settings)


def _made(part: tuple[str, dict[str, Any]]) -> Any:
    make: Callable[..., Any] = getattr(transformers, part[0])
    return make(**part[1])


def tiny_model(family: str, processor: Any) -> PreTrainedModel:
    """Return a dense model of `family` with random weights that fits `processor`: its token ids, and one for each token."""
    return tiny_vlm(family, ids=ids_of(processor), vocab_size=len(processor.tokenizer))


def ids_of(processor: Any) -> dict[int, int]:
    """Return the token ids of `processor` by those of the tiny models' settings."""
    tokenizer = processor.tokenizer

    def known(*tokens: str) -> int:
        return next(id for id in map(tokenizer.get_vocab().get, tokens) if id is not None)

    ids = {
        IMAGE: known("<IMG_ATOM>", processor.tokenizer.convert_ids_to_tokens(processor.image_token_ids[0])),
        VIDEO: getattr(processor, "video_token_id", None) or known("</s>"),
    }
    ids |= {START: known(*STARTS), END: known(*ENDS), 94: known("<|audio|>", "<pad>"), 95: known("<pad>")}
    return ids | {84 + index: known(token, "</s>") for index, token in enumerate(OVIS[1:2] + OVIS[3:])}


def tiny_checkpoint(family: str, folder: Path) -> Path:
    """Save a dense model of `family` and its processor in `folder`."""
    processor = tiny_processor(family)
    tiny_model(family, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
