"""The verbs serve and vllm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from moe_llava.cli.common import Checkpoint, Dtype, KeepExperts, heavy_imports, user_errors, verb


@verb("Use a model", "moe-llava serve runs/demo/stage3")
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="the address to listen at; another than this machine's own needs --api-keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="the model's name for clients; default: the folder's")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="a file with a key per line, one of which a client has to send")] = None,
    slots: Annotated[int, typer.Option(min=1, help="answers that are generated at once")] = 8,
    max_waiting: Annotated[int, typer.Option(min=0, help="requests that may wait for a slot; more are refused")] = 32,
    time_limit: Annotated[float, typer.Option(min=0.1, help="seconds for an answer, including the time it waits for a slot")] = 300.0,
    prefix_cache: Annotated[int, typer.Option(min=0, help="MiB for the beginnings of prompts, which later prompts share; 0: none")] = 512,
    allow_image_host: Annotated[
        list[str] | None, typer.Option(help="a host that images may be fetched from; may be given several times. Default: none")
    ] = None,
    dtype: Dtype = "auto",
    keep_experts: KeepExperts = None,
) -> None:
    """Serve OpenAI's chat completions over HTTP, with continuous batching, and a chat page. SIGTERM finishes what has begun."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint, check_dtype, read_examples
        from moe_llava.serving.http.listen import listener, read_keys

        if not math.isfinite(time_limit):
            raise ValueError(f"--time-limit is {time_limit:g}, but must be finite")
        check_dtype(dtype, keep_experts)
        check_checkpoint(checkpoint, keep_experts)
        examples = read_examples(checkpoint)
        keys = read_keys(api_keys, host)
        with listener(host, port) as socket:
            # These take seconds, and a mistake is reported first.
            from moe_llava.serving.http.fetch import Fetcher
            from moe_llava.serving.http.protocol import Limits

            limits = Limits()
            fetcher = Fetcher(allow_image_host, limits) if allow_image_host else None

            with heavy_imports():
                from moe_llava.checkpoints.offload import load_for_inference
                from moe_llava.serving.engine.engine import Engine
                from moe_llava.serving.http.api import build_app
                from moe_llava.serving.http.connections import http_server, serve_until_signal

            model, processor, cache = load_for_inference(checkpoint, dtype, keep_experts)
            counts = None if cache is None else cache.counts
            engine = Engine(model, processor.tokenizer, slots, max_waiting, time_limit, prefix_cache * 2**20)
            name = name or Path(checkpoint).resolve().name
            application = build_app(engine, processor, name, limits, keys, fetcher, counts, examples)
            at, bound = socket.getsockname()[:2]
            url = f"http://{f'[{at}]' if ':' in at else at}:{bound}"
            serve_until_signal(http_server(application, engine, limits), socket, f"serving {name}: an API at {url}/v1, a page at {url}")


@verb("Use a model", "moe-llava vllm runs/sparse --tensor-parallel 2")
def vllm(
    checkpoint: Checkpoint,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="devices that share every layer")] = 1,
    data_parallel: Annotated[int, typer.Option(min=1, help="copies of the model")] = 1,
    expert_parallel: Annotated[bool, typer.Option("--expert-parallel", help="divide whole experts among all devices")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="machines, joined by Ray")] = 1,
) -> None:
    """Print the command line of vLLM for a checkpoint, and the memory that each device needs. Nothing is started."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint
        from moe_llava.serving.vllm_command import Layout, device_bytes, vllm_command

        layout = Layout(tensor_parallel, data_parallel, expert_parallel, nodes)
        if problem := layout.problem():
            raise ValueError(problem)
        check_checkpoint(checkpoint, plain=True)
        command = vllm_command(checkpoint, layout)
        with heavy_imports():
            from moe_llava.checkpoints.load import load_config
            from moe_llava.training.budget import survey

        config = load_config(checkpoint)
        if problem := layout.problem_with(config.get_text_config().num_attention_heads):
            raise ValueError(problem)
        weights, cache = device_bytes(survey(checkpoint)[0], config, layout)
        print(command)
        print(f"each device, computed: {weights / 2**30:.3g} GiB of weights in bfloat16, {cache / 2**10:.3g} KiB of cache for a token")
