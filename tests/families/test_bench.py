"""`bench generate` with a checkpoint of any family."""

import pytest
import torch

from moe_llava import upcycle
from moe_llava.perf.generate import models_of, write
from moe_llava.perf.pairs import DENSE, SPARSE
from tests.families.processors import ROWS, tiny_model, tiny_processor


@pytest.mark.parametrize("family", sorted(ROWS))
def test_the_dense_partner_has_as_many_active_parameters(family, tmp_path):
    processor = tiny_processor(family)
    processor.save_pretrained(tmp_path)
    upcycle(tiny_model(family, processor)).save_pretrained(tmp_path)
    models, prompts = models_of(str(tmp_path), "tiny", torch.float32, torch.device("cpu"))
    dense, sparse = models[DENSE], models[SPARSE]
    assert type(dense) is sparse.dense_class
    for name, model in models.items():
        assert write(model, prompts[name](2), 3, {}).shape == (2, 3)
    active = sum(parameter.numel() // (2 if ".experts." in name else 1) for name, parameter in sparse.named_parameters())
    routers = sum(mlp.router.weight.numel() for mlp in sparse.sparse_mlps().values())
    assert sum(parameter.numel() for parameter in dense.parameters()) == active - routers
