"""What trainers of others read in the text config: TRL replaces the forward pass, and takes the fields of the balance loss from there."""

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaProcessor, upcycle
from moe_llava.digits.base import image_processor
from moe_llava.digits.tokenizer import build_tokenizer
from tests.conftest import FAMILIES, tiny_config, tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of, shuffled_sparse


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_config_has_the_fields_whatever_the_activation(family, tmp_path):
    sparse = upcycle(tiny_dense(family), num_experts=3, num_experts_per_tok=1, router_aux_loss_coef=0.07)
    sparse.save_pretrained(tmp_path)
    for model in (sparse, MoeLlavaForConditionalGeneration.from_pretrained(tmp_path)):
        text = model.config.get_text_config()
        assert (text.num_experts, text.num_experts_per_tok, text.router_aux_loss_coef, text.output_router_logits) == (3, 1, 0.07, False)
    changed = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, router_aux_loss_coef=0.5, output_router_logits=True)
    assert changed.config.get_text_config().router_aux_loss_coef == 0.5
    assert changed.config.get_text_config().output_router_logits


def test_the_coefficient_counts_wherever_it_is_set():
    sparse = shuffled_sparse("llama")
    inputs = {**tiny_inputs(), "labels": labels_of(tiny_inputs())}
    found = sparse(**inputs, output_router_logits=True)
    for config in (sparse.config, sparse.config.get_text_config()):
        for coefficient in (0.0, 0.4):
            config.router_aux_loss_coef = coefficient
            loss = sparse(**inputs, output_router_logits=True).loss
            torch.testing.assert_close(loss, found.language_loss + coefficient * found.aux_loss)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_trl_applies_the_balance_loss(family, tmp_path):
    """Three steps, with the coefficient of the model, without the loss, and with another coefficient."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = build_tokenizer()
    config = tiny_config(family)
    config.image_token_id = tokenizer.image_token_id
    config.vision_config.image_size = 48
    torch.manual_seed(0)
    dense = LlavaForConditionalGeneration(config)
    start = {name: weight.clone() for name, weight in dense.state_dict().items()}
    processor = MoeLlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where is the red 7 ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "the red 7"}]},
    ]
    colours = ("red", "blue", "green", "white", "black", "yellow")
    data = Dataset.from_list([{"messages": turns, "images": [Image.new("RGB", (48, 48), colour)]} for colour in colours])

    def three_steps(coefficient):
        dense.load_state_dict(start)
        model = upcycle(dense, router_aux_loss_coef=0.2)
        arguments = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,
            router_aux_loss_coef=coefficient,
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=processor)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    own, without, other = three_steps(None), three_steps(0.0), three_steps(0.5)
    assert len(own) == len(without) == 3
    assert all("aux_loss" not in entry for entry in without)
    # Its formula is Mixtral's: the mean over the layers of E * sum_i f_i * P_i, f over all k choices, so k where the load is even.
    assert own[0]["aux_loss"] == pytest.approx(2.0, abs=0.3)
    for entries, coefficient in ((own, 0.2), (other, 0.5)):
        assert entries[0]["loss"] == pytest.approx(without[0]["loss"] + coefficient * entries[0]["aux_loss"], rel=1e-4)
        assert all(entry["loss"] > plain["loss"] + 0.2 for entry, plain in zip(entries, without, strict=True))
