"""Pretraining of the parts: stopped and resumed, it is what it would be undisturbed."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from moe_llava.digits import pretrain
from moe_llava.digits.pretrain import STATE, Saved, pretrain_language_model, pretrain_tower
from moe_llava.digits.scenes import HARD, STANDARD


@pytest.mark.parametrize("part", ["tower", "language-model"])
def test_it_resumes(part, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "TOWER_SAVE_STEPS", 2)
    monkeypatch.setattr(pretrain, "TEXT_SAVE_STEPS", 2)
    monkeypatch.setattr(pretrain, "CARD_STEPS", 1)
    monkeypatch.setattr(pretrain, "probe_tower", lambda model, level: 0.5)
    monkeypatch.setattr(pretrain, "text_accuracy", lambda model, level: {"all": 0.5})

    def run(out, seed=1):
        if part == "tower":
            pretrain_tower(4, seed, out, pairs=2, level=STANDARD)
        else:
            pretrain_language_model(4, seed, out, rows=2, questions=2, width=32, level=HARD)

    run(tmp_path / "whole")
    save, saves = Saved.save, []

    def stop(self, step):
        save(self, step)
        saves.append(step)
        if len(saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Saved, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    with pytest.raises(SystemExit, match=r"is of .*'seed': 1.*, but this command of .*'seed': 2"):
        run(tmp_path / "stopped", seed=2)
    random.seed(9)
    torch.manual_seed(9)
    run(tmp_path / "stopped")
    assert saves == [2, 4]
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not (tmp_path / "stopped" / STATE).exists()
    assert 0.5 in json.loads((tmp_path / "stopped" / "pretraining.json").read_text()).values()
    with pytest.raises(SystemExit, match=r"stopped is complete: choose another folder"):
        run(tmp_path / "stopped")
    assert all(torch.equal(whole[name], tensor) for name, tensor in load_file(tmp_path / "stopped" / "model.safetensors").items())
