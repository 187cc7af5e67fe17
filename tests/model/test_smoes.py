"""SMoES against its formulas, written out in plain loops."""

import math

import pytest
import torch

from moe_llava import MoeLlavaForConditionalGeneration, upcycle
from moe_llava.model.losses import balance_loss
from moe_llava.model.smoes import IMAGE, TEXT, ModalityStatistics, mutual_information_loss
from tests.conftest import IMAGE_TOKENS, tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of, shuffled_sparse
from tests.model.test_moe import config


def statistics_of(sparse: MoeLlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in sparse.state_dict().items() if ".statistics." in name}


def learned(steps: int = 3, **settings) -> MoeLlavaForConditionalGeneration:
    """A model with SMoES that has seen a few batches."""
    sparse = shuffled_sparse("llama", routing="smoes", **settings).train()
    for seed in range(steps):
        inputs = tiny_inputs(seed=seed)
        sparse(**inputs, labels=labels_of(inputs))
    return sparse.eval()


def reference_scores(x_TD, mean_MD, var_MD):
    """M_jm = softmax(LL_jm / tau), LL = -1/2 sum_d (log var + (x - mu)^2 / var), tau = D / 2, in float64 and loops."""
    width = x_TD.shape[1]
    scores = []
    for x_D in x_TD.double().tolist():
        likelihoods = []
        for mean_D, var_D in zip(mean_MD.double().tolist(), var_MD.double().tolist(), strict=True):
            terms = [math.log(var) + (x - mean) ** 2 / var for x, mean, var in zip(x_D, mean_D, var_D, strict=True)]
            likelihoods.append(-0.5 * sum(terms) / (0.5 * width))
        highest = max(likelihoods)
        exponentials = [math.exp(value - highest) for value in likelihoods]
        scores.append([value / sum(exponentials) for value in exponentials])
    return torch.tensor(scores)


def reference_information(logits_TE, scores_TM, bins):
    """I(m; B) of P(m, B), in loops."""
    probs_TE = logits_TE.double().softmax(-1).tolist()
    scores = scores_TM.double().tolist()
    s = {}
    for m in (0, 1):
        for number, experts in enumerate(bins):
            total = sum(scores[j][m] * probs_TE[j][e] for e in experts for j in range(len(scores)))
            s[m, number] = total / (len(experts) * sum(row[m] for row in scores))
    p = {key: value / sum(s.values()) for key, value in s.items()}
    information = 0.0
    for (m, number), value in p.items():
        of_m = sum(other for (mm, _), other in p.items() if mm == m)
        of_bin = sum(other for (_, bb), other in p.items() if bb == number)
        information += value * math.log(value / (of_m * of_bin))
    return information


def reference_moments(x_TD, rows_T):
    x_ND = x_TD[rows_T].double()
    return x_ND.mean(0), x_ND.var(0, correction=0)


def test_modality_scores_are_those_of_the_formula():
    torch.manual_seed(0)
    statistics = ModalityStatistics(config(), 5)
    statistics.mean.normal_()
    statistics.var.uniform_(0.5, 2.0)
    statistics.load.fill_(0.25)
    x_TD, ids_TK = torch.randn(7, 5), torch.randint(0, 4, (7, 2))
    scores_TM, _ = statistics(x_TD, ids_TK, torch.tensor([True] * 3 + [False] * 4), None)
    torch.testing.assert_close(scores_TM, reference_scores(x_TD, statistics.mean, statistics.var).float())


def test_statistics_are_running_ones():
    torch.manual_seed(0)
    statistics = ModalityStatistics(config(), 5)
    is_image_T = torch.tensor([True, True, True, False, False, False, True])
    real_T = torch.tensor([True] * 6 + [False])  # the last one is padding
    batches = [(torch.randn(7, 5) * 2 + 40, torch.rand(7, 4).topk(2).indices) for _ in range(3)]
    mean, var, load = {}, {}, {}
    for number, (x_TD, ids_TK) in enumerate(batches):
        _, sums = statistics(x_TD, ids_TK, is_image_T, real_T)
        statistics.update(sums)
        for m, rows_T in ((IMAGE, is_image_T & real_T), (TEXT, ~is_image_T & real_T)):
            batch_mean, batch_var = reference_moments(x_TD, rows_T)
            batch_load = torch.tensor([sum(row.count(e) for row in ids_TK[rows_T].tolist()) for e in range(4)]) / rows_T.sum() / 2
            old = 0.99 if number else 0.0
            mean[m] = old * mean.get(m, 0) + (1 - old) * batch_mean
            var[m] = old * var.get(m, 0) + (1 - old) * batch_var
            load[m] = old * load.get(m, 0) + (1 - old) * batch_load
    for m in (IMAGE, TEXT):
        torch.testing.assert_close(statistics.mean[m].double(), mean[m], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(statistics.var[m].double(), var[m], atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(statistics.load[m], load[m])


def test_a_modality_that_is_absent_keeps_its_statistics():
    statistics = ModalityStatistics(config(), 5)
    x_TD, ids_TK = torch.randn(6, 5), torch.zeros(6, 2, dtype=torch.long)
    only_text_T = torch.zeros(6, dtype=torch.bool)
    scores_TM, sums = statistics(x_TD, ids_TK, only_text_T, None)
    torch.testing.assert_close(scores_TM, torch.full((6, 2), 0.5))  # nothing is known yet
    statistics.update(sums)
    assert statistics.seen.tolist() == [False, True]
    assert statistics.mean[IMAGE].tolist() == [0.0] * 5
    assert statistics(x_TD, ids_TK, only_text_T, None)[0][:, TEXT].tolist() == [1.0] * 6
    statistics.update(statistics(x_TD, ids_TK, ~only_text_T, None)[1])
    before = {name: buffer.clone() for name, buffer in statistics.named_buffers()}
    statistics.update(statistics(x_TD + 1, ids_TK + 1, only_text_T, None)[1])
    for name, buffer in statistics.named_buffers():
        assert torch.equal(buffer[IMAGE], before[name][IMAGE]), name
    assert not torch.equal(statistics.load[TEXT], before["load"][TEXT])


def test_experts_are_sorted_into_bins_by_their_share_of_text():
    statistics = ModalityStatistics(config(num_experts=6, routing="smoes"), 5)
    assert statistics.bins().tolist() == [[0, 1], [2, 3], [4, 5]]
    statistics.load[TEXT] = torch.tensor([0.30, 0.00, 0.10, 0.20, 0.40, 0.00])
    statistics.load[IMAGE] = torch.tensor([0.10, 0.50, 0.10, 0.20, 0.10, 0.00])
    # f(e): 0.75, 0, 0.5, 0.5, 0.8, and half for the one that nothing took.
    assert statistics.bins().tolist() == [[1, 2], [3, 5], [0, 4]]


def test_mutual_information_is_that_of_the_formula():
    torch.manual_seed(0)
    logits_TE, scores_TM = torch.randn(9, 6), torch.rand(9, 1)
    scores_TM = torch.cat([scores_TM, 1 - scores_TM], dim=-1)
    bins = [[4, 0], [1, 5], [3, 2]]
    expected = -reference_information(logits_TE, scores_TM, bins)
    assert mutual_information_loss((logits_TE,), (scores_TM,), [torch.tensor(bins)]).item() == pytest.approx(expected, rel=1e-4)
    padded = torch.cat([logits_TE, torch.full((2, 6), 9.0)]), torch.cat([scores_TM, torch.zeros(2, 2)])
    mask_T = torch.tensor([True] * 9 + [False] * 2)
    found = mutual_information_loss((padded[0],), (padded[1],), [torch.tensor(bins)], mask_T)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_mutual_information_has_its_bounds():
    bins = [torch.arange(4).view(2, 2)]
    apart = torch.tensor([[50.0, 50.0, 0.0, 0.0], [0.0, 0.0, 50.0, 50.0]]).repeat(3, 1)
    hard = torch.eye(2).repeat(3, 1)
    assert mutual_information_loss((apart,), (hard,), bins).item() == pytest.approx(-math.log(2), abs=1e-6)
    assert mutual_information_loss((torch.zeros(6, 4),), (hard,), bins).item() == pytest.approx(0.0, abs=1e-6)
    assert mutual_information_loss((apart,), (torch.full((6, 2), 0.5),), bins).item() == pytest.approx(0.0, abs=1e-6)
    alone = torch.tensor([[0.0, 1.0]]).repeat(6, 1)
    assert mutual_information_loss((apart,), (alone,), bins).item() == pytest.approx(0.0, abs=1e-6)


def test_the_loss_teaches_routers_to_tell_the_modalities_apart():
    """Gradient steps on the mutual information alone, of the routers alone: image and text part company."""
    sparse = learned().requires_grad_(False)
    inputs = tiny_inputs(batch=4)
    routers = [mlp.router.weight.requires_grad_(True) for mlp in sparse.sparse_mlps().values()]
    optimizer = torch.optim.Adam(routers, lr=0.03)
    losses = []
    for _ in range(30):
        loss = sparse(**inputs, output_router_logits=True).mi_loss
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad.abs().sum() > 0 for weight in routers)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 3 * losses[0] < 0


def test_the_loss_has_all_its_parts():
    sparse = learned(router_aux_loss_coef=0.3, router_z_loss_coef=0.2, router_mi_loss_coef=0.5)
    inputs = tiny_inputs()
    labels = labels_of(inputs)
    assert sparse(**inputs, labels=labels).mi_loss is None
    full = sparse(**inputs, labels=labels, output_router_logits=True)
    expected = full.language_loss + 0.3 * full.aux_loss + 0.2 * full.z_loss + 0.5 * full.mi_loss
    torch.testing.assert_close(full.loss, expected)
    mlps = list(sparse.sparse_mlps().values())
    bins = [mlp.statistics.bins() for mlp in mlps]
    torch.testing.assert_close(full.aux_loss, balance_loss(full.router_logits, groups=bins))
    information = sum(
        reference_information(logits, scores, bins_GN.tolist())
        for logits, scores, bins_GN in zip(full.router_logits, full.modality_scores, bins, strict=True)
    )
    assert full.mi_loss.item() == pytest.approx(-information, rel=1e-3)
    assert full.mi_loss < 0
    # While training, what was known before the batch judges it.
    torch.testing.assert_close(sparse.train()(**inputs, labels=labels).loss, full.loss)


def test_statistics_learn_in_training_only():
    sparse = shuffled_sparse("llama", routing="smoes")
    inputs = tiny_inputs()
    labels = labels_of(inputs)
    start = statistics_of(sparse)
    sparse(**inputs, labels=labels, output_router_logits=True)
    sparse.generate(**inputs, max_new_tokens=2)
    sparse.train()(**inputs)  # no labels: nothing is learnt from
    assert all(torch.equal(buffer, start[name]) for name, buffer in statistics_of(sparse).items())
    inputs_TD = []
    sparse.sparse_mlps()[2].register_forward_pre_hook(lambda _, arguments: inputs_TD.append(arguments[0].flatten(0, 1)))
    sparse(**inputs, labels=labels)
    statistics = sparse.sparse_mlps()[2].statistics
    is_image_T = (inputs["input_ids"] == 98).flatten()
    assert int(is_image_T.sum()) == 2 * IMAGE_TOKENS
    for m, rows_T in ((IMAGE, is_image_T), (TEXT, ~is_image_T)):
        mean_D, var_D = reference_moments(inputs_TD[0].detach(), rows_T)
        torch.testing.assert_close(statistics.mean[m].double(), mean_D, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(statistics.var[m].double(), var_D, atol=1e-5, rtol=1e-4)


def test_statistics_are_in_float32_whatever_the_model_is_in(tmp_path):
    """Half precision would round steps of a hundredth away."""
    sparse = upcycle(tiny_dense("llama").to(torch.bfloat16), routing="smoes").train()
    inputs = tiny_inputs()
    sparse(**inputs, labels=labels_of(inputs))
    expected = statistics_of(sparse)
    assert all(buffer.bfloat16().float().ne(buffer).any() for buffer in expected.values())
    sparse.save_pretrained(tmp_path)
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    random = MoeLlavaForConditionalGeneration._from_config(sparse.config, dtype=torch.bfloat16)
    for model in (loaded, loaded.half(), loaded.to("cpu", torch.bfloat16)):
        for name, buffer in statistics_of(model).items():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, expected[name]), name
    assert {buffer.dtype for buffer in statistics_of(random).values()} == {torch.float32}
    assert statistics_of(random.to("meta"))["model.language_model.layers.0.mlp.statistics.mean"].is_meta


def test_routing_may_change_at_load(tmp_path):
    """With SMoES, which a checkpoint without it knows nothing for, statistics begin anew."""
    shuffled_sparse("llama").save_pretrained(tmp_path / "agnostic")
    model = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "agnostic", routing="smoes")
    fresh = statistics_of(upcycle(tiny_dense("llama"), routing="smoes"))
    found = statistics_of(model)
    assert found.keys() == fresh.keys()
    assert all(torch.equal(found[name], fresh[name]) for name in found)
    split = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "agnostic", routing="modality_split")
    assert split(**tiny_inputs(), output_router_logits=True).aux_loss.isfinite()
