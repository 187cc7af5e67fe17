"""Token ids, label masks and batches."""

import pytest
import torch
from PIL import Image

from moe_llava import upcycle
from moe_llava.common.errors import DataError
from moe_llava.data.batches import IGNORE_INDEX, Collator, ConversationDataset
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.digits.base import build_base
from tests.conftest import FAMILIES, IMAGE_TOKENS, tiny_dense


@pytest.fixture(scope="module")
def processor():
    return build_base()[1]


@pytest.fixture
def records(tmp_path):
    Image.new("RGB", (48, 48), (10, 20, 30)).save(tmp_path / "a.png")
    return [
        Record("one", (("<image>\nwhere is the red 7 ?", "top-left"), ("how many digits are there ?", "2")), (tmp_path / "a.png",)),
        Record("two", (("is there a red 7 ?", "yes"),)),
    ]


def test_labels_are_the_answers_with_their_end(processor, records):
    item = ConversationDataset(records, Encoder(processor))[0]
    tokenizer = processor.tokenizer
    learnt = item["labels"][item["labels"] != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(learnt.tolist()) == ["top-left", "</s>", "2", "</s>"]
    assert torch.equal(item["labels"][item["labels"] != IGNORE_INDEX], item["input_ids"][item["labels"] != IGNORE_INDEX])


def test_ids_equal_those_of_the_processor(processor, records):
    item = ConversationDataset(records, Encoder(processor))[0]
    text = processor.tokenizer.apply_chat_template(records[0].messages(), tokenize=False)
    expected = processor(text=text, images=Image.open(records[0].images[0]), add_special_tokens=False, return_tensors="pt")
    assert torch.equal(item["input_ids"], expected["input_ids"][0])
    assert torch.equal(item["pixel_values"], expected["pixel_values"])
    assert (item["input_ids"] == processor.image_token_id).sum() == 36


def test_batches_are_padded_on_the_right(processor, records):
    dataset = ConversationDataset(records, Encoder(processor))
    batch = Collator(dataset.encoder.nothing())([dataset[0], dataset[1]])
    length = len(dataset[1]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][0].all()
    assert batch["attention_mask"][1].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert (batch["labels"][1, length:] == IGNORE_INDEX).all()
    assert (batch["input_ids"][1, length:] == processor.tokenizer.pad_token_id).all()
    assert batch["pixel_values"].shape == (1, 3, 48, 48)
    assert "pixel_values" not in Collator(dataset.encoder.nothing())([dataset[1]])


def test_an_empty_image_changes_no_loss(processor, records):
    """The projector takes part in the backward pass."""
    model, _ = build_base()
    dataset = ConversationDataset([records[1], records[1]], Encoder(processor))
    plain = Collator(dataset.encoder.nothing())([dataset[0], dataset[1]])
    batch = Collator(dataset.encoder.nothing(), dataset.encoder.empty_image())([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (1, 3, 48, 48)
    length = plain["input_ids"].shape[1]
    for name in plain:
        assert torch.equal(batch[name][:, :length], plain[name])
    expected, found = model(**plain), model(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits[:, :length], expected.logits)
    found.loss.backward()
    gradients = [parameter.grad for parameter in model.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_template_whose_answers_cannot_be_found_is_refused(processor, records):
    from copy import deepcopy

    plain = deepcopy(processor)
    plain.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="name one of phi, stablelm"):
        ConversationDataset(records, Encoder(plain))
    assert ConversationDataset(records, Encoder(plain, "phi"))[1]["labels"].max() > 0
    plain.tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template: name one of"):
        ConversationDataset(records, Encoder(plain))
    plain.tokenizer.chat_template = "{%- generation -%}{%- endgeneration -%}"
    ConversationDataset(records, Encoder(plain))
    plain.tokenizer.pad_token = None
    with pytest.raises(DataError, match="no pad token"):
        ConversationDataset(records, Encoder(plain))


def test_an_unreadable_record_is_left_out_and_reported(processor, records, tmp_path):
    (tmp_path / "b.png").write_bytes(b"no image")
    broken = Record("three", records[0].turns, (tmp_path / "b.png",))
    dataset = ConversationDataset([broken, *records], Encoder(processor))
    collate = Collator(dataset.encoder.nothing(), dataset.encoder.empty_image())
    batch = collate([dataset[0], dataset[1], dataset[2]])
    assert len(batch["problems"]) == 1
    assert "three names the image" in batch.pop("problems")[0]
    expected = collate([dataset[1], dataset[2]])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    empty = collate([dataset[0]])
    assert len(empty["problems"]) == 1
    assert (empty["labels"] == IGNORE_INDEX).all()
    assert empty["pixel_values"].shape == (1, 3, 48, 48)


def test_two_images_in_a_caption_are_a_problem(processor, records):
    """The chat template of captions renders one image."""
    two = Record("two", (("<image><image>\nwhat ?", "red"),), records[0].images * 2)
    problem = ConversationDataset([two], Encoder(processor, "plain"))[0]["problem"]
    assert problem == "two: the chat template makes 1 <image> of 2 images"


def test_records_are_cut_at_the_limit(processor, records):
    whole = ConversationDataset(records, Encoder(processor))[0]
    length = len(whole["input_ids"])
    cut = ConversationDataset(records, Encoder(processor, max_length=length - 2))[0]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-2])
    assert torch.equal(cut["labels"], whole["labels"][:-2])
    assert torch.equal(ConversationDataset(records, Encoder(processor, max_length=length))[0]["labels"], whole["labels"])
    first_answer = int((whole["labels"] != IGNORE_INDEX).nonzero()[0])
    for limit, message in (
        (first_answer, "nothing to learn from is left of it at the limit of"),
        (9, "an image goes beyond the limit of 9"),
    ):
        problem = ConversationDataset(records, Encoder(processor, max_length=limit))[0]["problem"]
        assert problem.startswith(f"one has {length} tokens, and ")
        assert message in problem


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_do_not_see_each_other(family, attention):
    """Loss and gradients, dense and sparse, are those of the padded batch."""
    dense = tiny_dense(family)
    if attention == "sdpa" and not dense.model.language_model._supports_sdpa:
        pytest.skip("transformers computes this family's attention without SDPA")
    dense.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    items = []
    for length, images in ((9, 1), (5, 0), (14, 2)):
        ids = torch.randint(3, 97, (1 + IMAGE_TOKENS * images + length,), generator=generator)
        ids[1 : 1 + IMAGE_TOKENS * images] = 98
        labels = ids.clone()
        labels[: 2 + IMAGE_TOKENS * images] = IGNORE_INDEX
        pixels = {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator)} if images else {}
        items.append({"input_ids": ids, "labels": labels} | pixels)
    for model in (dense, upcycle(dense, num_experts_per_tok=1, capacity_factor=1.0)):
        model.train()
        found = []
        for packed in (False, True):
            batch = Collator({"input_ids": torch.tensor([0])}, packed=packed)(items)
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
            found.append((loss, gradients))
        assert batch["input_ids"].shape == (1, sum(len(item["labels"]) for item in items))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_an_empty_image_beside_packed_samples(processor, records):
    model, _ = build_base()
    dataset = ConversationDataset([records[1], records[1]], Encoder(processor))
    items = [dataset[0], dataset[1]]
    plain = Collator(dataset.encoder.nothing())(items)
    batch = Collator(dataset.encoder.nothing(), dataset.encoder.empty_image(), packed=True)(items)
    torch.testing.assert_close(model(**batch).loss, model(**plain).loss)


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_an_empty_image_beside_packed_samples_changes_no_router(processor, records, capacity):
    """Losses and gradients of a sparse model with a trainable projector equal those of the padded batch, and of a batch without it."""
    dense, _ = build_base()
    model = upcycle(dense, num_experts=4, num_experts_per_tok=2, router_z_loss_coef=0.01, capacity_factor=capacity).train()
    dataset = ConversationDataset([records[1], Record("three", (("how many digits are there ?", "2"),))], Encoder(processor))
    items, nothing, empty = [dataset[0], dataset[1]], dataset.encoder.nothing(), dataset.encoder.empty_image()
    found = []
    for collate in (
        Collator(nothing),
        Collator(nothing, empty),
        Collator(nothing, empty, packed=True),
    ):
        model.zero_grad()
        outputs = model(**collate(items), output_router_logits=True)
        outputs.loss.backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if "language_model" in name}
        found.append((outputs.loss, outputs.aux_loss, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)
    assert all(each.grad is not None for each in model.model.multi_modal_projector.parameters())


def test_text_alone_is_cut_at_the_models_limit(processor, records):
    from copy import deepcopy

    short = deepcopy(processor)
    short.tokenizer.model_max_length = 6
    problem = ConversationDataset([records[1]], Encoder(short))[0]["problem"]
    assert "nothing to learn from is left of it at the limit of 6" in problem
    assert "problem" not in ConversationDataset([records[0]], Encoder(short))[0]


def test_a_system_prompt_replaces_that_of_the_template(processor, records):
    spoken = Record("s", records[1].turns, system="there is a red 7 .")
    dataset = ConversationDataset([records[1], spoken], Encoder(processor, "v1"))
    plain, other = (processor.tokenizer.decode(dataset[index]["input_ids"]) for index in (0, 1))
    assert "there is a red 7 ." in other
    assert "there is a red 7 ." not in plain
    assert torch.equal(dataset[0]["labels"][dataset[0]["labels"] >= 0], dataset[1]["labels"][dataset[1]["labels"] >= 0])
