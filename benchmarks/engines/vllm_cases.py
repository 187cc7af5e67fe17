"""Run cases that `cases.py` wrote in vLLM, and compare the tokens. Runs in vLLM's environment, without this package.

VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/engines/vllm_cases.py OUT [NAME ...] [--tensor-parallel 2] [--compiled]
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import vllm
from PIL import Image
from vllm import LLM, SamplingParams

NATIVE = "native-"  # cases that engines know by themselves, without code from the checkpoint


def run_case(folder: Path, tensor_parallel: int, compiled: bool) -> dict[str, Any]:
    """Return how many prompts get the same tokens."""
    content = json.loads((folder / "cases.json").read_text())
    native = folder.name.startswith(NATIVE)
    engine = LLM(
        model=str(folder),
        model_impl="auto" if native else "transformers",
        trust_remote_code=not native,
        dtype="float32",
        enforce_eager=not compiled,
        tensor_parallel_size=tensor_parallel,
        max_model_len=256,
        seed=0,
    )
    prompts = [
        {"prompt": prompt["text"], "multi_modal_data": {"image": Image.open(folder / prompt["image"])}} for prompt in content["prompts"]
    ]
    never = dict.fromkeys(content["suppressed"], -100.0)  # vLLM ignores suppress_tokens
    settings = SamplingParams(temperature=0, max_tokens=content["new_tokens"], logit_bias=never or None)
    found = [list(output.outputs[0].token_ids) for output in engine.generate(prompts, settings, use_tqdm=False)]
    same = sum(tokens == prompt["tokens"] for tokens, prompt in zip(found, content["prompts"], strict=True))
    del engine
    gc.collect()
    return {"same": same, "prompts": len(prompts)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    print(f"vLLM {vllm.__version__}, tensor parallel {arguments.tensor_parallel}, compiled: {arguments.compiled}")
    for name in arguments.names or sorted(folder.name for folder in arguments.out.iterdir() if (folder / "cases.json").is_file()):
        found = run_case(arguments.out / name, arguments.tensor_parallel, arguments.compiled)
        print(f"RESULT {name}: {found['same']} of {found['prompts']} equal", flush=True)


if __name__ == "__main__":
    main()
