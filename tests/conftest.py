"""What several rooms' tests use: tiny models of every family, golden data, the installed command."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="moe-llava-tests-")  # read when `datasets` is imported
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch
import transformers
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner, Result

from moe_llava.cli import app

REPOSITORY = Path(__file__).parents[1]
FAMILIES = {
    "phi": "PhiConfig",
    "phi3": "Phi3Config",
    "stablelm": "StableLmConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "glm4": "Glm4Config",
}
IMAGE_TOKEN_ID = 120  # the vocabulary of the tiny models ends at 99: the placeholder has no row in the embedding table
IMAGE_TOKENS = 4


def tiny_config(family: str, layers: int = 4) -> LlavaConfig:
    text = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "phi" else 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # large weights, so that a mistake shows
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    return LlavaConfig(
        vision_config=vision,
        text_config=getattr(transformers, FAMILIES[family])(**text),
        image_token_index=98,
        vision_feature_layer=-2,
    )


def tiny_dense(family: str, seed: int = 0, layers: int = 4) -> LlavaForConditionalGeneration:
    """A dense LLaVA of `family` with random weights; transformers' own class needs its placeholder inside the vocabulary (98)."""
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(tiny_config(family, layers)).eval()


def wide_dense(family: str) -> LlavaForConditionalGeneration:
    """The same with widths that are multiples of 64, as 4 bits need on a CPU."""
    config = tiny_config(family)
    config.text_config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 32})
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def tiny_inputs(batch: int = 2, text: int = 8, seed: int = 1, image_token_id: int = 98) -> dict[str, torch.Tensor]:
    """Rows of one token, an image, and `text` tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (batch, 1 + IMAGE_TOKENS + text), generator=generator)
    ids[:, 1 : 1 + IMAGE_TOKENS] = image_token_id
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded outputs of the original implementation; its README says what they are."""
    return REPOSITORY / "tests" / "golden"


def run_here(*arguments: str | Path, stdin: str = "") -> Result:
    """The command in this process, which has imported everything already: a start takes seconds, and one of a kind shows that it works."""
    environment = {"COLUMNS": "160", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # it sets them: taken back
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments], input=stdin)


def refused(*arguments: str | Path) -> str:
    """What the command says on standard error after `error: `, where it cannot work. Progress bars may come before: they are switched off
    when transformers is imported, and here it has been."""
    done = run_here(*arguments)
    assert done.exit_code == 2, done.output
    _, told, what = done.stderr.partition("error: ")
    assert told, done.output
    return what


_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["torch", "transformers.models.auto.modeling_auto", "transformers.models.llava.modeling_llava"])


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in a new process, which has imported torch and transformers but not the package. Processes
    are forked from one that has imported them once, and so start in no time and with no memory of other tests."""
    with _FRESH.Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(function, arguments)


def run_command(*arguments: str | Path, stdin: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The installed `moe-llava`, as a user runs it."""
    command = Path(sys.executable).parent / "moe-llava"
    return subprocess.run(
        [str(command), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "160"},
    )


def pytest_collection_finish():
    """Exempt what imports leave from the garbage collector: a million objects, which every run of Trainer would go through twice."""
    gc.collect()
    gc.freeze()
