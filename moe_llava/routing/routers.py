"""The routers of a model of transformers, and the experts that they choose from: found by what transformers records as `router_logits`.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from moe_llava.model import SparseModel
from moe_llava.routing.tokens import RoutingError


@dataclass(frozen=True)
class RoutedExperts:
    """A router and the stacked experts beside it, by their names in the model. `layer`: the index of their layer; a layer may have several,
    such as one for each modality. A token uses `top_k` of `num_experts`."""

    layer: int
    router: str
    experts: str
    num_experts: int
    top_k: int


def routed_experts(model: PreTrainedModel) -> list[RoutedExperts]:
    """Return the experts that a MoE model of transformers chooses from by the routers that it records, in the order of layers.

    What is recorded is a router, or a block that holds one router or several. Raise RoutingError if there is no router, or one without
    stacked experts beside it.
    """
    found = []
    for recorded in find_routers(model):
        inside = _experts_within(model, recorded)
        beside = f"{recorded.rpartition('.')[0]}.experts"
        found += [_checked(model, router, experts) for router, experts in inside.items() or [(recorded, beside)]]
    return found


def routers_within(model: PreTrainedModel, recorded: str) -> list[str]:
    """Return the routers in a module that `find_routers` found: those beside the stacked experts that it holds, or itself."""
    return list(_experts_within(model, recorded)) or [recorded]


def _experts_within(model: PreTrainedModel, recorded: str) -> dict[str, str]:
    """Return router -> the stacked experts beside it, in a module that is recorded; empty if it is a router itself."""
    parts = model.get_submodule(recorded).named_modules()
    inside = [f"{recorded}.{name}" for name, part in parts if name and _is_stacked(name, part)]
    return {_router_beside(model, experts): experts for experts in inside}


def check_routers(model: PreTrainedModel) -> None:
    """Raise RoutingError, naming the router, unless the routers of `model`, which is on the meta device, choose from stacked experts beside
    them, and return logits and choices for the hidden states of tokens."""
    width, groups = model.config.get_text_config().hidden_size, routed_experts(model)
    if len(sizes := {(group.num_experts, group.top_k) for group in groups}) > 1:
        found = ", ".join(f"{used} of {number}" for number, used in sorted(sizes))
        raise RoutingError(f"the routers of {type(model).__name__} differ in their numbers of experts: {found}")
    for group in groups:
        router = model.get_submodule(group.router)
        try:
            logits_and_choice(router(torch.empty(2, width, device="meta")), group)
        except TypeError as error:
            raise RoutingError(f"the router {group.router} ({type(router).__name__}) needs more than hidden states: {error}") from error


def logits_and_choice(output: Any, group: RoutedExperts) -> tuple[Tensor, Tensor]:
    """Return the logits [T, E] and the indices of the chosen experts [T, K] in a router's output. Raise RoutingError unless these are its
    first and third part."""
    parts = output if isinstance(output, tuple) else (output,)
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else None for part in parts]
    logits, _, ids = [*shapes, None, None, None][:3]
    well_formed = logits and ids and (logits[1:], ids[1:]) == ((group.num_experts,), (group.top_k,))
    if not well_formed or parts[2].is_floating_point():
        raise RoutingError(
            f"the router {group.router} returns shapes {shapes}, but must return logits [T, {group.num_experts}], weights, and the indices "
            f"[T, {group.top_k}] of the chosen experts for stage III to train it"
        )
    return parts[0], parts[2]


def _checked(model: PreTrainedModel, router: str, experts: str) -> RoutedExperts:
    name, _, last = experts.rpartition(".")
    beside = dict(model.get_submodule(name).named_children())
    if last not in beside or not _is_stacked(experts, beside[last]):
        raise RoutingError(f"the router {router} of {type(model).__name__} has no stacked experts beside it")
    top_k = getattr(model.get_submodule(router), "top_k", None)
    if not isinstance(top_k, int):
        raise RoutingError(f"the router {router} of {type(model).__name__} has no `top_k`, the number of experts that a token uses")
    return RoutedExperts(layer_index(router), router, experts, _number_in(beside[last]), top_k)


def _is_stacked(name: str, module: nn.Module) -> bool:
    """Return whether a module holds the weights of experts, [E, ...], as parameters of its own."""
    return name.rpartition(".")[2] == "experts" and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _number_in(experts: nn.Module) -> int:
    return next(parameter.shape[0] for parameter in experts.parameters(recurse=False) if parameter.dim() == 3)


def _router_beside(model: PreTrainedModel, experts: str) -> str:
    """Return the name of the module beside `experts` that has a row for each of them. Raise RoutingError unless there is one."""
    block, number = experts.rpartition(".")[0], _number_in(model.get_submodule(experts))
    found = [
        f"{block}.{name}"
        for name, module in model.get_submodule(block).named_children()
        if any(parameter.dim() == 2 and parameter.shape[0] == number for parameter in module.parameters(recurse=False))
    ]
    if len(found) != 1:
        raise RoutingError(f"{block} of {type(model).__name__} has {len(found)} modules that may be the router of its experts")
    return found[0]


def find_routers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return name -> router of the language model, in the order of layers. Raise RoutingError if there is none."""
    scopes = [
        (f"{prefix}." if prefix else "", recorder)
        for prefix, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
        for recorder in _recorders(part)
    ]
    outside = vision_routers(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if name not in outside.values()
        and any(name.startswith(prefix) and _is_recorded(name, module, recorder) for prefix, recorder in scopes)
    }
    if not found and outside:
        raise RoutingError(f"{type(model).__name__} has routers of patches alone, in {', '.join(outside)}: none of tokens")
    if not found:
        raise RoutingError(f"{type(model).__name__} has no routers: it is dense, or transformers does not record its router_logits")
    return found


def vision_routers(model: PreTrainedModel) -> dict[str, str]:
    """Return label -> name of each router outside the language model, which routes patches: of models that are made here."""
    return {label: f"{name}.router" for label, name in model.vision_names.items()} if isinstance(model, SparseModel) else {}


def _recorders(model: PreTrainedModel) -> list[OutputRecorder]:
    """Return the sources of its router_logits that a model declares. transformers accepts a recorder, a class, the end of a module's name,
    or a list of these."""
    declared = model._can_record_outputs.get("router_logits", []) if isinstance(model._can_record_outputs, Mapping) else []
    recorders = []
    for one in declared if isinstance(declared, list | tuple) else [declared]:
        if isinstance(one, str):
            one = OutputRecorder(target_class=None, class_name=one)
        recorders.append(one if isinstance(one, OutputRecorder) else OutputRecorder(target_class=one))
    return recorders


def _is_recorded(name: str, module: nn.Module, recorder: OutputRecorder) -> bool:
    by_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
    by_name = recorder.class_name is not None and name.endswith(recorder.class_name)
    within = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
    return (by_class or by_name) and within


def layer_index(name: str) -> int:
    """Return the first number in a module's name. Raise RoutingError if there is none."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if number is None:
        raise RoutingError(f"the router {name} is in no numbered layer")
    return number
