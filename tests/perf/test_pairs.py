"""A sparse model and its dense partner: parameters, batches, training steps."""

import pytest
import torch

from moe_llava.perf.options import MODEL_SIZES, BenchError
from moe_llava.perf.pairs import DENSE, SIZES, SPARSE, batch_of, build, checked_rivals, labels_of
from moe_llava.perf.rivals import DEEPSPEED, MIXTRAL, RIVALS, loss_with_balance, mixtral_layer, rivals_of
from moe_llava.perf.train import ALL_LOGITS, LOSSES, learner, loss_of_all_logits, step_of
from moe_llava.training.budget import count

CPU, META = torch.device("cpu"), torch.device("meta")


def test_every_size_is_an_option():
    assert tuple(SIZES) == MODEL_SIZES


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_the_dense_partner_has_as_many_active_parameters_and_as_much_arithmetic(name):
    sparse, dense = (count(build(SIZES[name].config(), which, torch.float32, META)) for which in (SPARSE, DENSE))
    config = SIZES[name].config()
    # Each expert of Phi adds a bias of its own to the sum: the wide FFN has one.
    biases = len(sparse.moe_layers) * config.text_config.hidden_size * (config.num_experts_per_tok - 1) if name == "phi2" else 0
    assert sparse.active["experts"] - biases == dense.active["FFN"] - sparse.active["FFN"]
    router = sparse.active["router"]
    assert sum(sparse.active.values()) - router - biases == sum(dense.active.values())
    assert sparse.flops - 2 * router - 2 * biases == dense.flops
    assert sparse.total["experts"] == 2 * sparse.active["experts"]


def test_rows_begin_with_an_image():
    for which in (DENSE, SPARSE, MIXTRAL):
        model = build(SIZES["tiny"].config(), which, torch.float32, CPU)
        batch = batch_of(model, 3, 40)
        is_image = batch["input_ids"] == model.config.image_token_id
        assert is_image[:, :36].all()
        assert not is_image[:, 36:].any()
        assert model(**batch).logits.shape == (3, 40, 99)
        assert (labels_of(batch) != -100).sum(dim=1).tolist() == [10, 10, 10]
        with pytest.raises(BenchError, match="2 rows of 36 tokens, but it needs 1 and 37: an image takes 36"):
            batch_of(model, 2, 36)


STEPS = [(SPARSE, (".experts.", ".router.")), (DENSE, (".mlp.",)), (MIXTRAL, (".mlp.",)), (DEEPSPEED, (".mlp.",))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("which", "trainable"), STEPS)
def test_a_step_changes_the_trainable_parameters_of_stage_three(which, trainable, dtype, deepspeed):
    model, batch = learner("tiny", which, dtype, CPU, 2, 48)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    step_of(model, batch, dtype, LOSSES.get(which))()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {
        name for name in before if "layers.0." in name and "language_model" in name and any(part in name for part in trainable)
    }
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rivals_compute_what_the_sparse_model_does(deepspeed):
    assert checked_rivals(SIZES["tiny"], CPU) == ([MIXTRAL, DEEPSPEED], [])
    sparse, batch = learner("tiny", SPARSE, torch.float32, CPU, 2, 48)
    for which in (MIXTRAL, DEEPSPEED):
        rival, same = learner("tiny", which, torch.float32, CPU, 2, 48)
        assert sum(each.numel() for each in rival.parameters()) == sum(each.numel() for each in sparse.parameters())
        if which == DEEPSPEED:  # Mixtral's balance loss counts second choices, too
            torch.testing.assert_close(loss_with_balance(rival, same), sparse(**batch).loss)


def test_a_rival_that_computes_something_else_is_not_compared(monkeypatch):
    def other(mlp):
        mlp.router.weight.data *= 1.01
        return mixtral_layer(mlp)

    monkeypatch.setitem(RIVALS, MIXTRAL, other)
    with pytest.raises(BenchError, match=r"width 32: with transformers' Mixtral a layer's output or the logits are .* off \(allowed"):
        checked_rivals(SIZES["tiny"], CPU)


def test_phi_has_no_experts_that_a_mixtral_could_have(deepspeed):
    sparse = build(SIZES["phi2"].config(), SPARSE, torch.float32, META)
    assert rivals_of(sparse.sparse_mlps()[0]) == ([DEEPSPEED], ["transformers' Mixtral block: left out, as its experts are gated"])


def test_logits_of_all_positions_give_the_same_language_loss():
    model, batch = learner("tiny", ALL_LOGITS, torch.float32, CPU, 2, 48)
    torch.testing.assert_close(loss_of_all_logits(model, batch), model(**batch).language_loss)
