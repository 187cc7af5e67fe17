"""Sparse upcycling: convert a dense vision-language model to a sparse one that computes the same (paper, section 3.3, stage III; arXiv
2212.05055), and initialise its experts differently, if requested.

Shapes: N rows, D model width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from .configuration import SparseConfig, sparse_config_class
from .ffn import as_expert, between, find_form, form_of, narrowed
from .grouped import linear
from .modeling import SparseLanguageModel, SparseModel, sparse_class
from .moe import Experts, SparseMlp
from .options import MoeOptions
from .places import ffn_names, find_backbone

ROUTER_STD = 0.02
EXPERT_STARTS = ("copy", "noise", "drop")
NOISE_STD = 0.1  # relative to the standard deviation of the weights
DROPPED = 0.5  # share of the columns of an expert that are drawn anew
MAX_DIFFERENCE = 0.02  # relative difference of an expert from its FFN; rounding in half precision stays below
PROBE_SCALES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # input magnitudes of the comparison: a clamp shows only for large ones
EVOLUTION_RATES = ((0.9, 0.99), (0.8, 0.89), (0.7, 0.79))  # ranges of beta_n, for the experts after the first


@torch.no_grad()
def upcycle(
    dense: PreTrainedModel,
    options: MoeOptions | None = None,
    *,
    expert_start: str = "copy",
    experts_from: Sequence[PreTrainedModel] = (),
    seed: int = 0,
    **fields: Any,
) -> SparseLanguageModel:
    """Copy the FFN of each chosen layer into `num_experts` experts behind a router with a small random start.

    With `norm_topk_prob` (and no capacity) the result computes what `dense` computes, up to rounding: the logits differ by about 1e-6 of
    their norm in float32, 0.2% in float16, 1% in bfloat16. With one expert per token and `norm_topk_prob` the weight is always 1, so
    that only the balance loss trains the router.

    Args:
        dense: any vision-language model of transformers whose layers have a feed-forward network of FFN_FORMS. The result shares all its
            parameters except the replaced FFNs: training one changes the other. Its mode (train or eval), dtype and device are kept.
        expert_start: "copy"; "noise", which adds different Gaussian noise to every expert, with NOISE_STD times the standard deviation of
            each parameter; or "drop" (Drop-Upcycling, arXiv 2502.19261), which draws the share DROPPED of each expert's columns anew, from
            a Gaussian with the mean and the standard deviation of the weights that they replace. After "noise" and "drop" the result
            computes approximately the same, or something else. For a fourth way see `evolve_experts`.
        experts_from: `num_experts` models that `dense` has been trained into; each gives the FFNs of one expert (Branch-Train-MiX, arXiv
            2403.07816), and `dense` the rest. By default every expert is a copy of the FFN of `dense`.
        seed: for the initial routers, the noise and the drawn columns; the routers are the same in any case.
        options: the options of the sparse model.
        fields: single fields of MoeOptions, such as `num_experts=4`, instead of `options` or on top of them.

    Raises:
        TypeError: `dense` is no model of transformers, or MoeOptions has no such field.
        ValueError: `dense` does not generate text from images or is sparse already, `expert_start` is unknown, an option breaks a rule of
            MoeOptions, or the FFN of this family is unknown or computes something other than the experts would (see ffn.py).
    """
    if isinstance(dense, SparseModel):
        raise ValueError(f"{type(dense).__name__} is sparse already, its experts were made by upcycle: upcycle its dense origin")
    if not isinstance(dense, PreTrainedModel):
        raise TypeError(f"upcycle takes a vision-language model of transformers, not a {type(dense).__name__}")
    check_kind(type(dense), dense.config)
    if has_experts(find_backbone(dense)[1].layers):
        raise ValueError(
            f"{type(dense).__name__} is sparse already, its layers have experts: it can be traced, evaluated, served and trained in "
            "stage III as it is"
        )
    if expert_start not in EXPERT_STARTS:
        raise ValueError(f"expert_start is {expert_start!r}, but must be one of {', '.join(EXPERT_STARTS)}")
    config = sparse_config(dense.config, replace(options or MoeOptions(), **fields))
    check_origins(dense, experts_from, config.num_experts)
    sparse = _make_sparse(dense, experts_from, config, generator := torch.Generator().manual_seed(seed))
    for mlp in sparse.all_sparse_mlps().values():
        if expert_start == "noise":
            _add_noise(mlp.experts, generator)
        elif expert_start == "drop":
            _draw_columns(mlp.experts, generator)
    return sparse


def check_origins(dense: PreTrainedModel, origins: Sequence[PreTrainedModel], num_experts: int) -> None:
    """Raise ValueError unless each of the models that give experts, if there are any, has the parameters of `dense`."""
    if not origins:
        return
    if len(origins) != num_experts:
        raise ValueError(f"experts_from has {len(origins)} models, but each gives one expert, and num_experts is {num_experts}")
    shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
    for number, origin in enumerate(origins):
        found = {name: parameter.shape for name, parameter in origin.named_parameters()}
        for name in shapes.keys() | found.keys():
            if shapes.get(name) != found.get(name):
                has, wanted = (str(list(shape[name])) if name in shape else "nothing" for shape in (found, shapes))
                raise ValueError(f"experts_from[{number}] is of another architecture: it has {has} as {name}, the model itself {wanted}")
        for part in ("hidden_act", "hidden_activation"):
            if getattr(origin.config.get_text_config(), part, None) != getattr(dense.config.get_text_config(), part, None):
                raise ValueError(f"experts_from[{number}] has another {part} than the model itself")


def check_kind(kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Raise ValueError unless models of a class, with a configuration of its own, see images and generate text."""
    if not issubclass(kind, GenerationMixin):
        raise ValueError(f"upcycle takes a vision-language model with transformers' generate, which {kind.__name__} lacks")
    if not hasattr(config, "vision_config"):
        raise ValueError(f"upcycle takes a vision-language model, but the configuration of {kind.__name__} has no vision_config")


def has_experts(layers: Iterable[nn.Module]) -> bool:
    """Return whether decoder layers have experts of their family's own."""
    return any(name.rpartition(".")[2] == "experts" for layer in layers for name, _ in layer.named_modules())


def _make_sparse(
    dense: PreTrainedModel, origins: Sequence[PreTrainedModel], config: SparseConfig, generator: torch.Generator
) -> SparseLanguageModel:
    dense_layers = find_backbone(dense)[1].layers
    for index in config.moe_layer_indices:
        find_form(dense_layers[index])
    names = ffn_names(dense, config)

    with torch.device("meta"):
        kind: Any = type(dense)
        sparse = sparse_class(kind)._from_config(config, dtype=dense.dtype)
    share_tensors(dense, sparse)
    for label, mlp in sparse.all_sparse_mlps().items():
        copied = [origin.get_submodule(names[label]) for origin in origins or [dense] * config.num_experts]
        try:
            _fill(mlp, dense.get_submodule(names[label]), copied, generator)
        except ValueError as error:
            raise ValueError(f"{_named(label)}: {error}") from error
    sparse.tie_weights()
    sparse.generation_config = copy.deepcopy(dense.generation_config)
    return sparse.train(dense.training)


def _named(label: int | str) -> str:
    """Return what an error calls the place of a SparseMlp."""
    return f"layer {label}" if isinstance(label, int) else label


def _fill(mlp: SparseMlp, ffn: nn.Module, copied: Sequence[nn.Module], generator: torch.Generator) -> None:
    """Initialise a SparseMlp in the place of `ffn`: its experts from the FFNs `copied`, its router at random. The parts of an FFN have the
    same row of the router, so that they are chosen together (arXiv 2410.07524, section 3.3)."""
    origin = next(ffn.parameters())  # device and dtype of this FFN: towers and language models may differ
    mlp.to_empty(device=origin.device).to(origin.dtype)
    experts, width = mlp.router.weight.shape
    rows = torch.randn(len(copied), width, generator=generator) * ROUTER_STD
    mlp.router.weight.copy_(rows.repeat_interleave(experts // len(copied), dim=0))
    if mlp.router.load_bias is not None:
        mlp.router.load_bias.reset()
    copy_into_experts(copied, mlp.experts, mlp.shared_experts)
    if mlp.coefficient is not None:
        mlp.residual_mlp = ffn
        mlp.coefficient.weight.copy_(torch.randn(mlp.coefficient.weight.shape, generator=generator) * ROUTER_STD)
        mlp.coefficient.bias.zero_()
    if mlp.statistics is not None:
        mlp.statistics.reset()


@torch.no_grad()
def copy_into_experts(ffns: Sequence[nn.Module], experts: Experts, shared: nn.Module | None = None) -> None:
    """Copy the weights of dense FFNs into the experts of a layer, and compare the outputs: its expert c is the FFN c, cut into G parts.

    The weights of a token's experts sum to 1, and each FFN has G of them, so the outputs of a part are multiplied by G. Where shared
    experts have the same part, both compute half of it. So a token gets what the FFN computes (arXiv 2410.07524, sections 3.3 and 3.4).

    Raise ValueError if no row of FFN_FORMS describes an FFN, or if the outputs differ: two families may give their parameters the same
    names and use them differently.
    """
    part, first = experts.intermediate_dim, as_expert(ffns[0])
    parts = first["down_proj"].shape[1] // part
    halved = 0 if shared is None else as_expert(shared)["down_proj"].shape[1] // part
    for copied, ffn in enumerate(ffns):
        for name, weight in (first if copied == 0 else as_expert(ffn)).items():
            stack = experts.get_parameter(name)
            for index in range(parts):
                scale = _scale(name, parts, index < halved, halved > 0)
                stack[copied * parts + index].copy_(between(name, weight, parts * part, index * part, (index + 1) * part)).mul_(scale)
    if shared is not None:
        _fill_shared(shared, ffns[0], halved * part)
    if not experts.get_parameter("down_proj").is_meta:
        for copied, ffn in enumerate(ffns):
            _compare(ffn, experts, range(copied * parts, (copied + 1) * parts), shared)


def _scale(name: str, parts: int, halved: bool, shared: bool) -> float:
    """Return the factor of an expert's parameter. The weighted sum of equal biases is the bias itself, however many there are."""
    if name == "down_proj":
        return parts * (0.5 if halved else 1.0)
    return 0.5 if name == "down_proj_bias" and shared else 1.0


def _fill_shared(shared: nn.Module, ffn: nn.Module, ffn_width: int) -> None:
    part = narrowed(ffn, ffn_width)
    for stacked, names in form_of(ffn).stacked.items():
        for name in names:
            shared.get_parameter(name).copy_(part.get_parameter(name)).mul_(0.5 if stacked.startswith("down_proj") else 1.0)


def _compare(ffn: nn.Module, experts: Experts, parts: range, shared: nn.Module | None) -> None:
    """Raise ValueError if the experts `parts` with equal weights, and the shared ones, compute another output than `ffn` for inputs of any
    scale in PROBE_SCALES. Each computes in its own dtype: models that give experts may have another than the model that they are for."""
    down = experts.get_parameter("down_proj")
    probe_ND = torch.linspace(-2, 2, 3 * experts.hidden_dim, device=down.device).sin().view(3, -1)
    probes = {scale: (scale * probe_ND).to(down.dtype) for scale in PROBE_SCALES}
    training, own = ffn.training, next(ffn.parameters())
    ffn.eval()
    expected = {scale: ffn(x_ND.to(own)).to(x_ND) for scale, x_ND in probes.items()}
    ffn.train(training)
    weights_of = experts.each()
    for scale, x_ND in probes.items():
        if scale > 1 and not expected[scale].isfinite().all():
            continue  # beyond the range of float16
        found_ND = 0 if shared is None else shared(x_ND)
        for expert in parts:
            found_ND = found_ND + experts.ffn(x_ND, partial(linear, weights_of(expert))) / len(parts)
        difference = (found_ND - expected[scale]).float().norm() / expected[scale].float().norm().clamp(min=1e-12)
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(
                f"{type(ffn).__name__} has the parameters of a row of FFN_FORMS in moe_llava/model/ffn.py, but computes something else "
                f"(expert {parts[0]}, inputs up to {scale:g}: {difference:.1%} off): it needs a row of its own, docs/customising.md"
            )


def _add_noise(experts: Experts, generator: torch.Generator) -> None:
    for parameter in experts.parameters():
        std = NOISE_STD * parameter[0].float().std(correction=0)
        for expert in parameter:  # one by one: noise for a whole stack takes gigabytes
            expert.add_(torch.randn(expert.shape, generator=generator).to(expert) * std.to(expert))


def _draw_columns(experts: Experts, generator: torch.Generator) -> None:
    """Draw the share DROPPED of each expert's columns of the FFN anew (arXiv 2502.19261, section 3.2)."""
    width = experts.intermediate_dim
    for expert in range(experts.num_experts):
        columns = torch.randperm(width, generator=generator)[: round(DROPPED * width)]
        for name, stack in experts.named_parameters():
            if name == "down_proj_bias":
                continue  # it belongs to no column
            for matrix in [stack[expert].T] if name == "down_proj" else stack[expert].unflatten(0, (-1, width)):
                old = matrix[columns].float()
                drawn = torch.randn(old.shape, generator=generator).to(old.device)
                matrix[columns] = (drawn * old.std(correction=0) + old.mean()).to(matrix.dtype)


def evolve_experts(sparse: SparseLanguageModel, batches: Sequence[Mapping[str, Tensor]], *, seed: int = 0) -> None:
    """Differentiate the experts of a freshly upcycled model by expert evolution (EvoMoE, arXiv 2505.23830).

    The first expert of each layer, theta_1, is kept; the n-th after it becomes beta_n theta_1 + (1 - beta_n) grad theta_1, with beta_n
    uniform in the n-th range of EVOLUTION_RATES. The gradient is that of the language loss, averaged over `batches`, with respect to the
    weights that all experts of a layer have in common. EvoMoE does this at every step while it trains theta_1; this is one such step.

    Args:
        batches: inputs of the model, with labels.
        seed: for the betas.

    Raises ValueError if the experts differ already, if there are more experts than ranges, or without a batch.
    """
    mlps = sparse.all_sparse_mlps()
    if sparse.config.num_experts > 1 + len(EVOLUTION_RATES):
        raise ValueError(f"num_experts is {sparse.config.num_experts}, but expert evolution has rates for {1 + len(EVOLUTION_RATES)} only")
    if sparse.config.granularity > 1:
        raise ValueError(f"granularity is {sparse.config.granularity}, but expert evolution starts from equal experts, not from parts")
    if not batches:
        raise ValueError("expert evolution needs at least one batch, to compute the gradient of its loss")
    for label, mlp in mlps.items():
        for name, parameter in mlp.experts.named_parameters():
            if not all(torch.equal(expert, parameter[0]) for expert in parameter):
                where = f"the experts of {_named(label)} differ in {name} already"
                raise ValueError(f"{where}: evolve those of a model fresh from upcycle")
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for mlp in mlps.values() for parameter in mlp.experts.parameters()]
    gradients = _common_gradients(sparse, parameters, batches)
    betas = [low + (high - low) * torch.rand((), generator=generator).item() for low, high in EVOLUTION_RATES]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            for beta, expert in zip(betas, parameter[1:], strict=False):
                expert.copy_(beta * parameter[0] + (1 - beta) * gradient)


def _common_gradients(sparse: SparseLanguageModel, parameters: list[nn.Parameter], batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return for each stacked parameter [E, ...] with equal slices the gradient with respect to the slice: the sum over the experts."""
    training = sparse.training
    sparse.eval()
    sums = [torch.zeros_like(parameter[0]) for parameter in parameters]
    for batch in batches:
        gradients = torch.autograd.grad(sparse(**batch).loss, parameters)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.sum(dim=0) / len(batches)
    sparse.train(training)
    return sums


def sparse_config(dense: PreTrainedConfig, options: MoeOptions) -> SparseConfig:
    """Return a dense model's configuration with `options` added. Raise ValueError as SparseConfig does."""
    settings = copy.deepcopy(dense).to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"):
        settings.pop(name, None)
    kind: Any = type(dense)
    config = sparse_config_class(kind)(**settings, **asdict(options))
    if hasattr(dense, "tie_word_embeddings"):
        # PreTrainedConfig takes the value of the text config, whatever its own is.
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = dense.tie_word_embeddings
    # `to_dict` leaves it out.
    config._attn_implementation = {"": dense._attn_implementation} | {
        name: part._attn_implementation for name in dense.sub_configs if (part := getattr(dense, name)) is not None
    }
    return config


def share_tensors(dense: PreTrainedModel, sparse: PreTrainedModel) -> None:
    """Replace every parameter and buffer of `sparse` that `dense` also has by the tensor of `dense`."""
    for name, module in sparse.named_modules(remove_duplicate=False):
        try:
            origin = dense.get_submodule(name)
        except AttributeError:
            continue  # part of a SparseMlp
        for key, parameter in origin._parameters.items():
            if module._parameters.get(key) is not None and parameter is not None:  # a Linear without bias has None
                module._parameters[key] = parameter
        for key in module._buffers.keys() & origin._buffers.keys():
            module._buffers[key] = origin._buffers[key]
