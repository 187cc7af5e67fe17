import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_llava.checkpoints.files import EXAMPLES, check_checkpoint, is_text_model, known_types, read_examples
from moe_llava.checkpoints.join import language_config
from moe_llava.checkpoints.supported import model_types
from moe_llava.common.errors import CheckpointError
from tests.conftest import REPOSITORY, refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ('{"model_type": "llama"}', "has model_type 'llama', which is no vision-language model of the installed transformers$"),
        ('{"model_type": "qwen3vl"}', "has model_type 'qwen3vl', .* of the installed transformers; did you mean qwen3_vl[?]$"),
        ('{"model_type": "moe_qwen3vl"}', "has model_type 'moe_qwen3vl', .* of the installed transformers; did you mean .*qwen3_vl"),
        ('{"model_type": 3}', "has model_type 3, which is no"),
        ('{"model_type": "moe_llava_phi"}', "is a checkpoint of the original code .moe_llava_phi.: convert it with `moe-llava convert`$"),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(tmp_path)


def test_every_vision_language_model_is_let_through(tmp_path):
    """The types read from the source of transformers are those of its table."""
    assert set(known_types()) == set(model_types())
    for model_type in [*known_types(), "moe_llava", "moe_qwen3_vl"]:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        check_checkpoint(tmp_path)
        assert not is_text_model(tmp_path)


def test_only_a_model_of_this_package_has_experts_to_keep(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "moe_qwen3_vl"}')
    check_checkpoint(tmp_path, keep_experts=0.5)
    with pytest.raises(CheckpointError, match=r"the share of experts to keep is 2, but must be above 0 and at most 1"):
        check_checkpoint(tmp_path, keep_experts=2)
    for model_type in ("qwen3_vl", "qwen3_vl_moe"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(CheckpointError, match="has no experts made by upcycle, of which to keep a share"):
            check_checkpoint(tmp_path, keep_experts=0.5)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        check_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="it is no folder, and the hub did not provide it"):
        check_checkpoint("owner/name")


@pytest.fixture
def deaf_hub():
    """(environment, requests of files) with the address of a hub that hangs up. Its client by itself would retry for half a minute."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            with contextlib.suppress(OSError):  # of the closed server
                while True:
                    connection = server.accept()[0]
                    if b"/resolve/" in connection.recv(65536):  # the hub's client may have a request of its own besides
                        asked.append(connection)
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
        del environment["HF_HUB_OFFLINE"]
        yield environment, asked
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("name", "requests"), [("owner/name", 1), ("https://nowhere/at", 0)])
def test_an_unreachable_hub_gets_one_request(name, requests, deaf_hub):
    environment, asked = deaf_hub
    code = f"from moe_llava.checkpoints.files import read_config; read_config({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"moe_llava.common.errors.CheckpointError: checkpoint {name} ")
    assert "Retrying" not in done.stderr
    assert len(asked) == requests


def test_a_recipe_with_missing_parts(deaf_hub):
    environment, asked = deaf_hub
    command = [Path(sys.executable).parent / "moe-llava", "params", "recipes/phi2-2.7b.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the language model microsoft/phi-2 is not found: ")
    assert len(asked) == 1


def test_an_unusable_cache_of_the_hub_is_named(tmp_path):
    (tmp_path / "home").write_text("a file")
    code = "from moe_llava.checkpoints.files import read_config; read_config('owner/name')"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert f"the hub's cache, {tmp_path / 'home'} (HF_HOME), cannot be used: [Errno 20] Not a directory" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("place", [None, "text_config"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "a_new_one"])
def test_unsupported_quantisation_is_refused(tmp_path, method, key, place):
    content = {key: {"quant_method": method, "bits": 4}}
    content = {"model_type": "llava", "vision_config": {}, **({place: content} if place else content)}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for arguments in (("chat", tmp_path, "hi"), ("params", tmp_path), ("upcycle", tmp_path, tmp_path / "out"), ("serve", tmp_path)):
        assert f"the config.json of {tmp_path} says that its weights are quantised by {method}: only plain" in refused(*arguments)


def test_a_quantised_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(CheckpointError, match=f"the language model {tmp_path} is quantised by bitsandbytes: a LLaVA is joined from plain"):
        language_config(str(tmp_path))


@pytest.mark.parametrize(("model_type", "verb"), [("llava", "chat"), ("llava_llama", "chat"), ("llava_llama", "convert")])
def test_the_layout_of_the_original_llava_is_refused(tmp_path, model_type, verb):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "mm_vision_tower": "openai/clip", "vocab_size": 9}))
    assert f"{tmp_path} names its tower as mm_vision_tower, as the original LLaVA code does" in refused(verb, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("arguments", [("chat", "hello"), ("convert", "{out}"), ("upcycle", "{out}"), ("params",)])
def test_adapters_are_refused(tmp_path, arguments):
    """An adapter of the original code holds a config.json of the whole model, one of PEFT does not."""
    verb, *rest = (argument.format(out=tmp_path / "out") for argument in arguments)
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    assert f"{folder} is an adapter, not a whole model: add it to its base with `moe-llava merge`" in refused(verb, folder, *rest)
    (folder / "non_lora_trainables.bin").write_bytes(b"")
    (folder / "config.json").write_text('{"model_type": "moe_llava_phi"}')
    assert f"{folder} is a LoRA adapter of the original code" in refused(verb, folder, *rest)
    assert f"{folder} is a LoRA adapter of the original code" in refused("merge", folder, tmp_path / "out")


def test_example_questions(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_examples(tmp_path) == []
    (tmp_path / EXAMPLES).write_text(json.dumps({"questions": ["what is this?"]}))
    assert read_examples(tmp_path) == ["what is this?"]
    for wrong in ({}, {"questions": "what?"}, {"questions": [1]}):
        (tmp_path / EXAMPLES).write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=f"{EXAMPLES} has the questions .*, but they must be a list of texts"):
            read_examples(tmp_path)
