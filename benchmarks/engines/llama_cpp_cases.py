"""Convert a case that `cases.py` wrote to GGUF, and compare its answers in llama.cpp with those of `generate`.

    python benchmarks/engines/llama_cpp_cases.py convert LLAMA_CPP CASE     where torch and transformers are installed
    python benchmarks/engines/llama_cpp_cases.py run CASE                   where llama-cpp-python is installed

LLAMA_CPP is the source of llama.cpp, for example `vendor/llama.cpp` of the source package of llama-cpp-python (0.3.36 was used).
"""

from __future__ import annotations

import base64
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

MODEL, TOWER = "model.gguf", "mmproj.gguf"


def convert(source: Path, case: Path) -> None:
    """Run llama.cpp's script twice: for the language model, and for the tower."""
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    from conversion import base

    # The script knows published tokenizers by a digest; those of the cases split text as Qwen's does.
    for kind in vars(base).values():
        if isinstance(kind, type) and hasattr(kind, "get_vocab_base_pre"):
            kind.get_vocab_base_pre = lambda *_: "qwen2"
    for out, options in ((MODEL, []), (TOWER, ["--mmproj"])):
        sys.argv = ["convert", str(case), "--outtype", "f32", "--outfile", str(case / out), *options]
        runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


def run(case: Path) -> dict[str, Any]:
    """Return how many prompts get the same tokens, and how much the logits before the first one differ, relative to the largest."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    content = json.loads((case / "cases.json").read_text())
    handler = MTMDChatHandler(str(case / TOWER), verbose=False, use_gpu=False)
    model = Llama(str(case / MODEL), n_ctx=256, verbose=False, type_k=0, type_v=0, chat_handler=handler)  # a cache in float32
    same, difference = 0, 0.0
    for prompt in content["prompts"]:
        url = "data:image/png;base64," + base64.b64encode((case / prompt["images"][0]).read_bytes()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt["question"]}]
        steps: list[np.ndarray] = []

        def keep(_: Any, logits: Any, steps: list[np.ndarray] = steps) -> Any:
            steps.append(np.array(logits, dtype=float))
            return logits

        settings = {"temperature": 0, "max_tokens": content["new_tokens"], "repeat_penalty": 1.0, "logits_processor": [keep]}
        model.create_chat_completion(messages=[{"role": "user", "content": parts}], **settings)
        expected = np.array(prompt["logits"])
        difference = max(difference, float(abs(steps[0] - expected).max() / abs(expected).max()))
        same += [int(step.argmax()) for step in steps][: content["new_tokens"]] == prompt["tokens"]
    return {"equal": same, "prompts": len(content["prompts"]), "logit_difference": difference}


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(json.dumps(run(Path(sys.argv[2]))), flush=True)
        os._exit(0)  # the handler fails when Python ends
