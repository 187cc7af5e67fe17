"""Token ids, label masks and batches."""

import pytest
import torch
from PIL import Image

from moe_llava.data.batches import IGNORE_INDEX, Collator, ConversationDataset, EmptyImage
from moe_llava.data.records import DataError, Record
from moe_llava.digits.base import build_base


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
    item = ConversationDataset(records, processor)[0]
    tokenizer = processor.tokenizer
    learnt = item["labels"][item["labels"] != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(learnt.tolist()) == ["top-left", "</s>", "2", "</s>"]
    assert torch.equal(item["labels"][item["labels"] != IGNORE_INDEX], item["input_ids"][item["labels"] != IGNORE_INDEX])


def test_ids_are_what_the_processor_gives(processor, records):
    item = ConversationDataset(records, processor)[0]
    text = processor.tokenizer.apply_chat_template(records[0].messages(), tokenize=False)
    expected = processor(text=text, images=Image.open(records[0].images[0]), add_special_tokens=False, return_tensors="pt")
    assert torch.equal(item["input_ids"], expected["input_ids"][0])
    assert torch.equal(item["pixel_values"], expected["pixel_values"])
    assert (item["input_ids"] == processor.image_token_id).sum() == 36


def test_batches_are_padded_on_the_right(processor, records):
    dataset = ConversationDataset(records, processor)
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[0], dataset[1]])
    length = len(dataset[1]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][0].all()
    assert batch["attention_mask"][1].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert (batch["labels"][1, length:] == IGNORE_INDEX).all()
    assert (batch["input_ids"][1, length:] == processor.tokenizer.pad_token_id).all()
    assert batch["pixel_values"].shape == (1, 3, 48, 48)
    assert "pixel_values" not in Collator(0)([dataset[1]])


def test_an_empty_image_changes_nothing_that_is_learnt(processor, records):
    """But its projector takes part."""
    model, _ = build_base()
    dataset = ConversationDataset([records[1], records[1]], processor)
    plain = Collator(processor.tokenizer.pad_token_id)([dataset[0], dataset[1]])
    batch = Collator(processor.tokenizer.pad_token_id, EmptyImage.of(processor))([dataset[0], dataset[1]])
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


def test_a_template_whose_answers_cannot_be_told_is_refused(processor, records):
    from copy import deepcopy

    plain = deepcopy(processor)
    plain.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="name one of phi, stablelm"):
        ConversationDataset(records, plain)
    assert ConversationDataset(records, plain, "phi")[1]["labels"].max() > 0
    plain.tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template: name one of"):
        ConversationDataset(records, plain)
    plain.tokenizer.chat_template = "{%- generation -%}{%- endgeneration -%}"
    ConversationDataset(records, plain)
    plain.tokenizer.pad_token = None
    with pytest.raises(DataError, match="no pad token"):
        ConversationDataset(records, plain)
