"""Run cases that `cases.py` wrote in vLLM, and compare the tokens. Runs in vLLM's environment (`make engines`).

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/engines/vllm_cases.py OUT [NAME ...] [--tensor-parallel 2] [--compiled] [--dtype bfloat16]

Each case runs in a process of its own. The exit code is 1 if a case turns out otherwise than docs/engines.md says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NATIVE = "native-"  # cases that engines know by themselves, without code from the checkpoint
PLUGIN = "-modality_split"  # cases for which vLLM finds the class of this package's plugin
# vLLM 0.32 computes these otherwise, or does not start: see docs/engines.md.
DIFFERENT = {"gemma3", "gemma3-dense", "gemma4", "qwen3_5", "qwen3_vl", "qwen3_vl-dense", "smolvlm", "vipllava"}
RESULT = "RESULT "


def run_case(folder: Path, tensor_parallel: int, compiled: bool, dtype: str) -> dict[str, Any]:
    """Return how many prompts get the same tokens, and the largest difference of a token's log probability where they do."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    content = json.loads((folder / "cases.json").read_text())
    backend = not folder.name.startswith(NATIVE) and not folder.name.endswith(PLUGIN)
    engine = LLM(
        model=str(folder),
        model_impl="transformers" if backend else "auto",
        trust_remote_code=backend,
        dtype=dtype,
        enforce_eager=not compiled,
        tensor_parallel_size=tensor_parallel,
        max_model_len=256,
        seed=0,
    )
    prompts = [
        {"prompt": prompt["text"], "multi_modal_data": {"image": [Image.open(folder / file) for file in prompt["images"]]}}
        for prompt in content["prompts"]
    ]
    never = dict.fromkeys(content["suppressed"], -100.0)  # vLLM ignores suppress_tokens
    settings = SamplingParams(temperature=0, max_tokens=content["new_tokens"], logit_bias=never or None, logprobs=0)
    same, difference = 0, 0.0
    for output, prompt in zip(engine.generate(prompts, settings, use_tqdm=False), content["prompts"], strict=True):
        found = output.outputs[0]
        if list(found.token_ids) == prompt["tokens"]:
            same += 1
            steps = zip(found.token_ids, found.logprobs, prompt["logprobs"], strict=True)
            difference = max(difference, *(abs(step[token].logprob - expected) for token, step, expected in steps))
    return {"equal": same, "prompts": len(prompts), "logprob_difference": difference}


def run_in_child(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the result of a case, or its last error."""
    options = [
        f"--tensor-parallel={arguments.tensor_parallel}",
        f"--dtype={arguments.dtype}",
        *(["--compiled"] if arguments.compiled else []),
    ]
    done = subprocess.run([sys.executable, __file__, arguments.out, name, "--child", *options], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
    return {"equal": 0, "error": errors[0] if errors else done.stderr[-300:]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = run_case(arguments.out / arguments.names[0], arguments.tensor_parallel, arguments.compiled, arguments.dtype)
        print(RESULT + json.dumps(found), flush=True)
        return
    names = arguments.names or sorted(folder.name for folder in arguments.out.iterdir() if (folder / "cases.json").is_file())
    unexpected = False
    for name in names:
        found = run_in_child(arguments, name)
        unexpected |= (found["equal"] == found.get("prompts")) == (name in DIFFERENT)
        print(f"{name}: {json.dumps(found)}", flush=True)
    sys.exit(unexpected)


if __name__ == "__main__":
    main()
