"""The verb chat."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_llava.cli.common import Checkpoint, Dtype, KeepExperts, heavy_imports, user_errors, verb

QUANTISATIONS = {4: "nf4", 8: "int8"}


@verb("Use a model", 'moe-llava chat runs/demo/stage3 --image picture.png "describe the image ."', "moe-llava chat runs/demo/stage3")
def chat(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="a question; without one, a conversation")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="an image to talk about; may be given several times")] = None,
    video: Annotated[Path | None, typer.Option(help="a video to talk about, for a model that takes videos")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per answer")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest answer, in tokens; default: 512, or what there is room for")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy decoding; above 0, up to 2: sampling")] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample from the most likely tokens whose probabilities sum to this")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="makes answers at a temperature above 0 repeatable")] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt, for a model whose chat template has one")] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8: quantise the linear layers and experts of the language model")] = None,
    dtype: Dtype = "auto",
    keep_experts: KeepExperts = None,
) -> None:
    """Query a model about images or a video: once, as a conversation on the terminal, or line by line through a pipe."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint, check_dtype
        from moe_llava.common.images import open_image
        from moe_llava.common.videos import missing_video
        from moe_llava.serving.engine.requests import check_sampling
        from moe_llava.training.parsing import require

        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty")
        check_sampling(temperature, top_p)
        if bits is not None:
            if bits not in QUANTISATIONS:
                raise ValueError(f"--bits is {bits}, but must be 4 or 8")
            require("bitsandbytes", "--bits")
            if keep_experts is not None:
                raise ValueError("--bits and --keep-experts do not go together: quantised layers are made from the whole model")
        check_dtype(dtype, keep_experts)
        check_checkpoint(checkpoint, keep_experts, plain=bits is not None)
        for path in image or []:
            open_image(path, "the conversation")
        if video is not None and not video.exists():
            raise missing_video("the conversation", video)

        # These take seconds, and a mistake is reported first.
        with heavy_imports():
            from moe_llava.serving.chat.conversation import Conversation, Settings
            from moe_llava.serving.chat.terminal import Terminal
            from moe_llava.serving.engine.engine import Engine

        model, processor, cache = _load(checkpoint, bits, dtype, keep_experts)
        with Engine(model, processor.tokenizer, slots=1, time_limit=math.inf) as engine:
            conversation = Conversation(engine, processor, Settings(max_new_tokens, temperature, top_p, seed, system))
            conversation.add_images(image or [])
            if video is not None:
                conversation.add_video(video)
            terminal = Terminal(conversation, Path(checkpoint).resolve().name, as_json, prompt is None and sys.stdin.isatty())
            if prompt is not None:
                terminal.ask(prompt)
            failed = prompt is None and not terminal.converse() and not terminal.interactive
        if cache is not None:
            print(cache.counts, file=sys.stderr)
        if failed:
            raise typer.Exit(1)


def _load(checkpoint: str, bits: int | None, dtype: str, keep_experts: float | None) -> tuple[Any, Any, Any]:
    """(model on the best device, processor, cache of experts if not all are kept in memory)"""
    if bits is None:
        from moe_llava.checkpoints.offload import load_for_inference

        return load_for_inference(checkpoint, dtype, keep_experts)

    import torch

    from moe_llava.checkpoints.files import resolve
    from moe_llava.checkpoints.load import best_device, load_checkpoint, load_config
    from moe_llava.checkpoints.weights import find_weights, read_tables, shape_bytes
    from moe_llava.model import SparseConfig
    from moe_llava.training.adapters import describe_quantised, quantisation_config, weight_bytes

    kind, config = QUANTISATIONS[bits], load_config(checkpoint)
    computing = getattr(torch, dtype, None) or config.dtype or torch.float32
    settings: dict[str, Any] = {"quantization_config": quantisation_config(checkpoint, kind, computing)}
    if isinstance(config, SparseConfig):
        settings["separate_experts"] = True
    model, processor = load_checkpoint(checkpoint, dtype, device_map=best_device(), **settings)
    stored = read_tables(find_weights(resolve(checkpoint, with_weights=True))).values()
    before = sum(shape_bytes(tensor.shape, tensor.dtype) for tensor in stored)
    sizes = f"the weights take {weight_bytes(model) / 1e6:,.1f} MB, {before / 1e6:,.1f} MB in the checkpoint"
    print(f"{describe_quantised(model, kind)}; {sizes}", file=sys.stderr)
    return model, processor, None
