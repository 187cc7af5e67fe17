"""Records are encoded as each family's own processor does."""

import pytest
import torch
from PIL import Image

from moe_llava import upcycle
from moe_llava.data.batches import IGNORE_INDEX, Collator, ConversationDataset
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.model.losses import logits_at_labels
from tests.families.processors import ROWS, tiny_model, tiny_processor

FAMILIES = sorted(ROWS)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    from moe_llava.data.rendering import make_portable

    made = tiny_processor(family)
    made.chat_template = made.tokenizer.chat_template = make_portable(made.chat_template, made.tokenizer, made.image_token)
    return made


@pytest.fixture(scope="module")
def pictures():
    """Pictures of several shapes, in colours that differ."""
    made = []
    for number, size in enumerate(((40, 30), (20, 60), (33, 33))):
        image = Image.new("RGB", size, (40 * number, 200, 90))
        image.paste((250, 30, 60 * number), (3, 5, 15, 18))
        made.append(image)
    return made


@pytest.fixture(scope="module")
def records(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
        paths.append(folder / f"{number}.png")
    return [
        Record("one", (("<image>\nWhat is in the picture?", "A red square."), ("Where?", "Here, above.")), (paths[0],)),
        Record("two", (("<image>\n<image>\nCompare them.", "One is wide."),), (paths[1], paths[2])),
        Record("text", (("Is <|image_pad|> or <image> a token?", "No."),)),
    ]


def answers(processor, item):
    """The runs of labels as text."""
    runs, last = [], -2
    for place in (item["labels"] != IGNORE_INDEX).nonzero().flatten().tolist():
        if place != last + 1:
            runs.append([])
        runs[-1].append(int(item["labels"][place]))
        last = place
    return [processor.tokenizer.decode(run) for run in runs]


def test_ids_and_pixels_are_those_of_the_processor(family, processor, records, pictures):
    item = Encoder(processor)(records[0])
    messages = records[0].messages()
    messages[0]["content"][0]["image"] = pictures[0]
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(item["input_ids"], expected["input_ids"][0])
    assert item.keys() - {"labels"} == expected.keys() - {"attention_mask"}
    for name in item.keys() - {"labels", "input_ids"}:
        found = item[name][None] if name.endswith("token_type_ids") else item[name]
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected[name])), name


def test_labels_are_the_answers(family, processor, records):
    encoder = Encoder(processor)
    found = answers(processor, encoder(records[0]))
    assert [text.strip().startswith(answer) for text, answer in zip(found, ("A red square.", "Here, above."), strict=True)] == [True, True]
    ends = {text.strip().replace("A red square.", "").replace("Here, above.", "") for text in found}
    assert len(ends) == 1
    (told,) = answers(processor, encoder(records[1]))
    assert told.strip().startswith("One is wide.")


def test_a_batch_is_that_of_the_processor(family, processor, records, pictures):
    """Images of several sizes, rows with none, one and two."""
    encoder = Encoder(processor)
    dataset = ConversationDataset([*records[:2], Record("t", (("Why?", "So."),))], encoder)
    batch = Collator(encoder.nothing())([dataset[0], dataset[1], dataset[2]])
    texts = [processor.apply_chat_template(record.messages(), tokenize=False) for record in dataset.records]
    expected = processor(
        text=texts,
        images=[[pictures[0]], [pictures[1], pictures[2]], []],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    pixels, wanted = batch["pixel_values"], expected["pixel_values"]
    assert torch.equal(pixels.flatten()[pixels.flatten() != 0], wanted.flatten()[wanted.flatten() != 0])


def test_a_batch_computes_what_its_rows_compute(family, processor, records):
    """Dense and sparse agree, and gradients reach the experts."""
    encoder = Encoder(processor)
    items = [encoder(record) for record in records]
    dense = tiny_model(family, processor)
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2).train()
    collate = Collator(encoder.nothing())
    batch = collate(items)
    with torch.no_grad():
        found = dense(**batch).logits
        scale = found.abs().max()
        assert (sparse.eval()(**batch).logits - found).abs().max() <= 1e-5 * scale
        for row, item in enumerate(items):
            alone = dense(**collate([item])).logits
            assert (found[row, : alone.shape[1]] - alone[0]).abs().max() <= 2e-5 * scale
        torch.testing.assert_close(dense(**batch, **logits_at_labels(batch["labels"])).loss, dense(**batch).loss)
    sparse.train()(**batch, output_router_logits=True).loss.backward()
    assert all(mlp.experts.down_proj.grad.any() for mlp in sparse.model.sparse_mlps().values())


def check_packing(family, processor, records):
    encoder = Encoder(processor)
    items = [encoder(record) for record in records]
    dense = tiny_model(family, processor).train()
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=1, capacity_factor=1.0).train()
    for model in (dense, sparse):
        losses = [model(**Collator(encoder.nothing(), packed=packed)(items)).loss for packed in (False, True)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_packed_records_compute_what_padded_ones_do(family, processor, records):
    """Where packing is refused, the processor marks the tokens of images."""
    if processor.return_mm_token_type_ids:
        pytest.skip("packing is refused for this family")
    check_packing(family, processor, records)
