"""Teachers and settings of distillation that are refused."""

import json
import shutil

import pytest

from moe_llava.common.errors import CheckpointError, DataError
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from tests.training.test_distil import QUIET, make_recipe, run, teacher  # noqa: F401


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "stage3.distillation.weight is 0, but must be above 0"),
        ({"weight": 1.5}, "stage3.distillation.weight is 1.5, but must be at most 1"),
        ({"temperature": -1.0}, "stage3.distillation.temperature is -1.0, but must be above 0"),
        ({"top_k": 0}, "stage3.distillation.top_k is 0, but must be above 0"),
        ({"teacher": None}, "stage3.distillation.teacher is None, but must be text"),
        ({"temprature": 2}, "unknown key stage3.distillation.temprature; did you mean stage3.distillation.temperature?"),
    ],
)
def test_settings_that_break_a_rule(make_recipe, settings, message):  # noqa: F811
    with pytest.raises(RecipeError) as error:
        load_recipe(make_recipe(distillation=settings))
    assert message in str(error.value)


def other_vocabulary(folder):
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocab = raw["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.get)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    file.write_text(json.dumps(raw))


def other_end(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("eos_token", "bos_token"))


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def damaged(folder):
    from moe_llava.training.saves import write_manifest

    write_manifest(folder, folder.glob("*.safetensors"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def a_language_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (shutil.rmtree, CheckpointError, "is not a folder"),
        (a_language_model, CheckpointError, "has model_type 'llama', which is no vision-language model"),
        (without_weights, CheckpointError, "has no weights"),
        (damaged, DataError, "is damaged"),
        (other_vocabulary, CheckpointError, r"other has another vocabulary:\n.* in the model of the stage"),
        (other_end, DataError, r"a test conversation: label \d+ of its answers is token \d+ to the model, but"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_teachers_that_are_refused_before_the_first_step(make_recipe, teacher, tmp_path, change, kind, message):  # noqa: F811
    shutil.copytree(teacher, tmp_path / "other")
    change(tmp_path / "other")
    with pytest.raises(kind, match=message):
        run(make_recipe(distillation={"teacher": str(tmp_path / "other")}))
    assert not (tmp_path / "run" / ".stage3").exists()


def test_more_tokens_than_there_are(make_recipe):  # noqa: F811
    with pytest.raises(RecipeError, match=r"stage3\.distillation\.top_k is 100, but must be at most the size of the vocabulary, 99"):
        run(make_recipe(distillation={"top_k": 100}))


def test_another_teacher_on_resume_is_refused(make_recipe, stopping):  # noqa: F811
    file = make_recipe()
    with stopping(2):
        run(file)
    with pytest.raises(RecipeError, match=r"was made with stage3\.distillation\.weight 0\.3, now 0\.5"):
        train(load_recipe(file, ["stage3.distillation.weight=0.5"]), [3], resume=True, console=QUIET)
