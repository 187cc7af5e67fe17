"""What a step computes, and what it leaves out, though nothing of it shows in the result."""

import pytest
import torch

from moe_llava.model.losses import logits_at_labels
from tests.conftest import FAMILIES, tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dense_model_makes_logits_only_where_a_row_has_a_label(family, checkpointing):
    dense = tiny_dense(family).train()
    if checkpointing:
        dense.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = tiny_inputs(batch=3)
    labels = labels_of(inputs)
    labels[:, -2:], labels[1] = -100, -100
    positions = []
    dense.lm_head.register_forward_hook(lambda _, arguments, output: positions.append(arguments[0].shape[1]))
    found = []
    for more in ({}, logits_at_labels(labels)):
        dense.zero_grad()
        loss = dense(**inputs, labels=labels, num_items_in_batch=torch.tensor(50), **more).loss
        loss.backward()
        found.append((loss, {name: parameter.grad for name, parameter in dense.named_parameters() if parameter.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert positions == [labels.shape[1], int((labels[0, 1:] != -100).sum())]


def test_a_dense_batch_without_a_label_has_a_loss_of_zero_and_gradients():
    dense = tiny_dense("llama").train()
    inputs = tiny_inputs()
    labels = torch.full_like(inputs["input_ids"], -100)
    loss = dense(**inputs, labels=labels, num_items_in_batch=torch.tensor(7), **logits_at_labels(labels)).loss
    loss.backward()
    assert loss.item() == 0
    for name in ("lm_head.weight", "model.multi_modal_projector.linear_1.weight"):
        assert dense.get_parameter(name).grad.abs().sum() == 0, name
