"""The data set is LLaVA's format, the same for the same seed, and the shipped parts are as good as said."""

import filecmp
import json
import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from moe_llava import upcycle
from moe_llava.common.errors import CheckpointError
from moe_llava.common.images import open_image
from moe_llava.data.store import load_records
from moe_llava.digits.base import WEIGHTS, build_base, image_processor, pixel_values
from moe_llava.digits.dataset import QUESTIONS_PER_IMAGE, _test_questions, write_dataset
from moe_llava.digits.pretrain import language_model_config, main
from moe_llava.digits.questions import FAMILIES, HARD_FAMILIES, sample_questions, vocabulary
from moe_llava.digits.scenes import HARD, render, sample_scene
from moe_llava.digits.tokenizer import build_tokenizer
from moe_llava.evaluation.score.definitions.digits_world import BENCHMARK


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_dataset(folder, train_images=6, test_images=5)
    return folder


def test_it_is_a_llava_data_set(folder):
    for name in ("captions", "train", "test"):
        records = load_records(folder / f"{name}.json", folder / "images")
        for record in records:
            open_image(record.images[0], record.source)
        assert all(len(record.images) == 1 for record in records)
    for record in load_records(folder / "train.json", folder / "images"):
        prompts = [prompt.removeprefix("<image>\n") for prompt, _ in record.turns]
        assert 3 <= len(prompts) <= 4
        assert prompts.index("describe the image .") == len(prompts) - 1
    test = json.loads((folder / "test.json").read_text())
    assert {record["family"] for record in test} == set(FAMILIES)
    assert len({record["id"] for record in test}) == len(test)
    assert all(record["image"].startswith("test/") for record in test)


def test_the_same_seed_writes_the_same_files(folder, tmp_path):
    write_dataset(tmp_path, train_images=6, test_images=5)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(folder, tmp_path, names, shallow=False)[0] == names


def test_fresh_scenes_are_none_of_the_training_scenes_and_change_no_other_file(folder, tmp_path):
    write_dataset(tmp_path / "fresh", train_images=6, test_images=5, fresh_images=400)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(folder, tmp_path / "fresh", names, shallow=False)[0] == names
    # In 400 random scenes there would be the two of a single digit again, with a probability of one half.
    train, fresh = (_descriptions(tmp_path / "fresh" / f"{name}.json") for name in ("train", "fresh"))
    assert len(fresh) > 300
    assert not train & fresh


def _descriptions(file):
    return {record["conversations"][-1]["value"] for record in json.loads(file.read_text())}


def test_the_hard_level(tmp_path):
    write_dataset(tmp_path, train_images=30, test_images=15, level=HARD, fresh_images=3)
    test = json.loads((tmp_path / "test.json").read_text())
    assert {record["family"] for record in test} == set(HARD_FAMILIES)
    tokenizer = build_tokenizer(HARD)
    for name in ("captions", "train", "fresh", "test"):
        for record in load_records(tmp_path / f"{name}.json", tmp_path / "images"):
            assert open_image(record.images[0], record.source).size == (64, 64)
            for prompt, answer in record.turns:
                assert tokenizer.unk_token_id not in tokenizer.encode(prompt.removeprefix("<image>") + " " + answer)
                assert len(tokenizer.encode(answer)) < BENCHMARK.max_new_tokens
    # The scenes of the fresh pictures do not depend on the number of the other pictures, if none is met again.
    write_dataset(tmp_path / "more", train_images=2, test_images=1, level=HARD, fresh_images=5)
    assert json.loads((tmp_path / "more" / "fresh.json").read_text())[:3] == json.loads((tmp_path / "fresh.json").read_text())


def test_a_part_of_another_level_is_refused():
    with pytest.raises(CheckpointError, match=r"tower has image_size 48, but the level hard of the digits world needs 64"):
        build_base(level=HARD)


def test_the_width_of_the_language_model():
    """By default the configuration is that of the shipped one; another width keeps layers and the width of a head."""
    shipped = LlamaConfig.from_pretrained(WEIGHTS / "language_model")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "initializer_range", "vocab_size"):
        assert getattr(language_model_config(), name) == getattr(shipped, name), name
    narrow = language_model_config(96, HARD)
    assert (narrow.hidden_size, narrow.intermediate_size, narrow.head_dim, narrow.num_hidden_layers) == (96, 256, 32, 6)
    assert narrow.vocab_size == len(build_tokenizer(HARD))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["language-model", "--width", "100"], "--width is 100, but must be a multiple of 32"),
        (["tower", "--width", "96"], "--width is for the language model"),
        (["tower", "--level", "easy"], "choose from"),
    ],
)
def test_pretraining_refuses_before_it_begins(arguments, message, monkeypatch, capsys, tmp_path):
    part, *options = arguments
    monkeypatch.setattr("sys.argv", ["pretrain", part, str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quick_pixels_are_the_image_processors(folder):
    from PIL import Image

    image = Image.open(folder / "images" / "train" / "000000.png")
    expected = torch.as_tensor(image_processor()(image, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(pixel_values([image]), expected, atol=1e-6, rtol=0)


def test_the_base_is_the_shipped_parts():
    model, processor = build_base()
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) == pytest.approx(5.4e6, rel=0.02)
    assert model.config.image_token_id == processor.image_token_id
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(build_base()[0].model.multi_modal_projector.linear_1.weight, model.model.multi_modal_projector.linear_1.weight)


@torch.no_grad()
def test_the_language_model_answers_from_text():
    from transformers import LlamaForCausalLM

    from moe_llava.digits.pretrain import text_accuracy

    scores = text_accuracy(LlamaForCausalLM.from_pretrained(WEIGHTS / "language_model", dtype=torch.float32), rows=120, seed=11)
    assert scores["all"] >= 0.97
    assert min(scores.values()) >= 0.93


@pytest.mark.slow
def test_the_tower_reads_unseen_handwriting():
    from transformers import CLIPModel

    from moe_llava.digits.base import build_base
    from moe_llava.digits.pretrain import probe_tower, tower_config

    model = CLIPModel(tower_config())
    model.vision_model.load_state_dict(build_base()[0].model.vision_tower.state_dict())
    assert probe_tower(model) >= 0.9


def test_the_base_made_sparse_computes_the_same():
    """In float32 to 1e-5 of the largest logit, with the shipped weights on a real scene."""
    dense, processor = build_base()
    generator = random.Random(0)
    scene = sample_scene(generator)
    inputs = processor(text="<image> describe the image . " + scene.caption, images=render(scene, generator, "test"), return_tensors="pt")
    with torch.no_grad():
        expected = dense.eval()(**inputs).logits
        found = upcycle(dense).eval()(**inputs).logits
    assert expected.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_the_page_says_of_the_questions():
    """docs/digits.md gives these shares of the whole data set."""
    generator = random.Random(0)
    scenes = [sample_scene(generator) for _ in range(3000)]
    drawn = [sample_questions(scene, generator, QUESTIONS_PER_IMAGE) for scene in scenes]
    assert np.mean([any(question.family == "caption" for question in questions) for questions in drawn]) == pytest.approx(0.37, abs=0.03)
    for questions, share in ((drawn, 0.47), ([_test_questions(scene, generator) for scene in scenes], 0.73)):
        answers = [question.answer for asked in questions for question in asked if question.family == "existence"]
        assert np.mean([answer == "no" for answer in answers]) == pytest.approx(share, abs=0.03)
    assert len(vocabulary()) == 64
    assert len(build_tokenizer()) == 71
