"""Adversarial pictures: changed along the model's own gradient. FGSM (Goodfellow et al., arXiv 1412.6572) takes one step, PGD (Madry et
al., arXiv 1706.06083) many from a random start.

No pixel changes by more than epsilon, in 1/255 of the range of pixels before normalisation, and none leaves the range. The gradient runs
through the whole model, including the routers of a sparse one, and each step routes anew. Attacked pixels are float32, not rounded to the
256 levels of a file; a model in bfloat16 rounds them like all its input.

Shapes: B batch, S sequence, N images in the batch, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llava.data.encoder import EXPERT_TYPES, TOKEN_TYPES
from moe_llava.evaluation.stress.perturb import Perturbation
from moe_llava.model.greedy import Allowed, end_tokens, prefill_positions, write_greedily
from moe_llava.model.losses import IGNORED, logits_at_labels

EPSILONS = (1, 2, 4, 8, 16)  # at strengths 1 to 5
PGD_STEPS = 10
STEP_SHARE = 2.5  # the sum of PGD's steps over epsilon, as in the CIFAR-10 challenge of Madry et al.

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class PixelRange:
    """Black, white, and 1/255 of their distance, after normalisation, each [C, 1, 1] float32."""

    black: Tensor
    white: Tensor
    unit: Tensor


def pixel_range(image_processor: Any) -> PixelRange:
    """Return the range of the pixel values that an image processor makes."""
    mean, deviation = torch.tensor([0.0]), torch.tensor([1.0])
    if image_processor.do_normalize:
        mean, deviation = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    black, white, unit = ((level * scale - offset) / deviation for level, offset in ((0, mean), (255, mean), (1, 0)))
    return PixelRange(*(value.float()[:, None, None] for value in (black, white, unit)))


def answer_losses(model: Any, inputs: Inputs, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of each row's labels [B, S], as [B] float32; -100 is no label. Inputs may continue a cache, which the
    attention mask then covers, too."""
    places, at_labels = prefill_positions(model, inputs)[..., -labels.shape[1] :], logits_at_labels(labels)
    logits = model(**inputs, position_ids=places, use_cache=False, logits_to_keep=at_labels["logits_to_keep"]).logits.float()
    targets = at_labels["shift_labels"]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(dim=1) / (targets != IGNORED).sum(dim=1).clamp(min=1)


def fgsm(model: Any, inputs: Inputs, labels: Tensor, pixels: PixelRange, epsilon: float) -> Tensor:
    """Return pixel values like the inputs', after one step of `epsilon` against the labels [B, S]. Raises ValueError as `pgd` does."""
    return pgd(model, inputs, labels, pixels, epsilon, steps=1, step_size=epsilon, seed=None)


@torch.inference_mode(False)
@torch.enable_grad()
def pgd(
    model: Any, inputs: Inputs, labels: Tensor, pixels: PixelRange, epsilon: float, steps: int, step_size: float, seed: int | None
) -> Tensor:
    """Return pixel values like the inputs', after `steps` of `step_size` (in 1/255, like epsilon) against the labels [B, S], from a random
    start if there is a `seed`. All images start with the same noise, so that none depends on the others in its batch.

    Raises ValueError for a model in training, inputs without images, or pixels out of range.
    """
    if model.training:
        raise ValueError("the model is in training, where dropout changes its gradient: call eval() before an attack")
    if "pixel_values" not in inputs:
        raise ValueError("the inputs have no images to attack")
    if inputs["pixel_values"].dim() < 4:
        raise ValueError("attacks need pixel values [..., channels, height, width], but the model takes images as flattened patches")
    # Copies, because tensors made in inference mode cannot take part in a backward pass.
    rest = {name: value.clone() for name, value in inputs.items() if name != "pixel_values"}
    given, labels = inputs["pixel_values"].clone(), labels.clone()
    black, white, unit = (value.to(given.device) for value in (pixels.black, pixels.white, pixels.unit))
    clean = given.float()
    if ((clean < black - 0.02) | (clean > white + 0.02)).any():  # half precision may round outwards
        ranges = f"{clean.min():.2f} to {clean.max():.2f}, but those of the image processor from {black.min():.2f} to {white.max():.2f}"
        raise ValueError(f"the pixel values go from {ranges}")
    low, high = (clean - epsilon * unit).clamp(min=black), (clean + epsilon * unit).clamp(max=white)
    attacked = clean
    if seed is not None:
        noise = torch.rand(clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean.device)
        attacked = clean + (2 * noise - 1) * epsilon * unit
    attacked = attacked.clamp(low, high)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        losses = answer_losses(model, {**rest, "pixel_values": attacked.to(given.dtype)}, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), attacked)
        attacked = (attacked + step_size * unit * gradient.sign()).clamp(low, high)
    return attacked.detach()


def attacked_pixels(
    model: Any, image_processor: Any, inputs: Inputs, attack: Perturbation, max_new_tokens: int, allowed: Allowed | None = None
) -> Tensor:
    """Return pixel values like the inputs', attacked by fgsm or pgd. The inputs are a batch of prompts, padded on the left. `allowed`: see
    `write_greedily`.

    The attack is against the model's own answer without it, including its end, so no ground truth is needed. Raises ValueError as `fgsm`
    does.
    """
    epsilon, pixels = EPSILONS[attack.strength - 1], pixel_range(image_processor)
    continued, labels = own_answers(model, inputs, max_new_tokens, allowed)
    if attack.name == "fgsm":
        attacked = fgsm(model, continued, labels, pixels, epsilon)
    else:
        attacked = pgd(model, continued, labels, pixels, epsilon, PGD_STEPS, STEP_SHARE * epsilon / PGD_STEPS, attack.seed)
    return attacked.to(inputs["pixel_values"].dtype)


@torch.no_grad()
def own_answers(model: Any, inputs: Inputs, max_new_tokens: int, allowed: Allowed | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs with the model's greedy answers, and labels, as `with_answers` does."""
    written = write_greedily(model, dict(inputs), max_new_tokens, allowed)[:, inputs["input_ids"].shape[1] :]
    is_end = torch.isin(written, torch.tensor(end_tokens(model), device=written.device, dtype=torch.long))
    # The end token is part of the answer; padding follows it.
    return with_answers(inputs, written, (is_end.cumsum(dim=1) - is_end.int()) == 0)


def with_answers(inputs: Inputs, answers: Tensor, answered: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return (inputs continued by answers [B, A], labels [B, S + A]: the answers where `answered` [B, A], -100 elsewhere)."""
    types = {name: F.pad(inputs[name], (0, answers.shape[1])) for name in (*TOKEN_TYPES, EXPERT_TYPES) if name in inputs}
    mask = torch.cat([inputs["attention_mask"], answered.to(inputs["attention_mask"])], dim=1)
    ids = torch.cat([inputs["input_ids"], answers], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answers.masked_fill(~answered, -100)], dim=1)
    return {**inputs, **types, "input_ids": ids, "attention_mask": mask}, labels
