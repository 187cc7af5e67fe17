"""Run by two processes: the loss and the gradients of a model in parts, against those of the same model as a whole in one process.

Arguments: a folder with checkpoints, a file for the result: {"name/ep_size": [difference of the losses, largest difference of a gradient]}.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

import moe_llava  # noqa: F401  its names, for the Auto classes
from tests.conftest import tiny_inputs


def differences(folder: Path, ep_size: int) -> list[float]:
    parts = AutoModelForImageTextToText.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2, ep_size=ep_size)).train()
    one = AutoModelForImageTextToText.from_pretrained(folder).train()
    inputs = tiny_inputs(batch=4, image_token_id=one.config.image_token_id)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == one.config.image_token_id, -100)
    expected = one(**inputs).loss
    expected.backward()
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    loss = parts(**{key: value[mine] for key, value in inputs.items()}).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean.div_(2))
    worst, compared = 0.0, 0
    for (name, parameter), part in zip(one.named_parameters(), parts.parameters(), strict=True):
        assert (parameter.grad is None) == (part.grad is None), name
        assert part.to_local().numel() < parameter.numel(), f"{name} is not sharded"
        if parameter.grad is not None:
            worst = max(worst, (part.grad.full_tensor() - parameter.grad).abs().max().item())
            compared += 1
    assert compared > 10
    return [(mean - expected).abs().item(), worst]


def main(folder: Path, result: Path) -> None:
    found = {}
    for checkpoint in sorted(path for path in folder.iterdir() if path.is_dir()):
        for ep_size in (1,) if checkpoint.name == "dense" else (1, 2):
            found[f"{checkpoint.name}/{ep_size}"] = differences(checkpoint, ep_size)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
