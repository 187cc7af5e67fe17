"""A sparse model and its dense partner: parameters, batches, training steps."""

import pytest
import torch

from moe_llava.perf.options import MODEL_SIZES, BenchError
from moe_llava.perf.pairs import DENSE, SIZES, SPARSE, batch_of, build, labels_of, pair
from moe_llava.perf.train import ALL_LOGITS, learner, loss_of_all_logits, step_of
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
    for model in pair(SIZES["tiny"], torch.float32, CPU).values():
        batch = batch_of(model, 3, 40)
        is_image = batch["input_ids"] == model.config.image_token_id
        assert is_image[:, :36].all()
        assert not is_image[:, 36:].any()
        assert model(**batch).logits.shape == (3, 40, 99)
        assert (labels_of(batch) != -100).sum(dim=1).tolist() == [10, 10, 10]
        with pytest.raises(BenchError, match="2 rows of 36 tokens, but it needs 1 and 37: an image takes 36"):
            batch_of(model, 2, 36)


@pytest.mark.parametrize(("which", "trainable"), [(SPARSE, (".experts.", ".router.")), (DENSE, (".mlp.",))])
def test_a_step_changes_the_trainable_parameters_of_stage_three(which, trainable):
    model, batch = learner("tiny", which, torch.float32, CPU, 2, 48)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    step_of(model, batch, torch.float32)()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {
        name for name in before if "layers.0." in name and "language_model" in name and any(part in name for part in trainable)
    }
    assert all(parameter.grad is None for parameter in model.parameters())


def test_logits_of_all_positions_give_the_same_language_loss():
    model, batch = learner("tiny", ALL_LOGITS, torch.float32, CPU, 2, 48)
    torch.testing.assert_close(loss_of_all_logits(model, batch), model(**batch).language_loss)
