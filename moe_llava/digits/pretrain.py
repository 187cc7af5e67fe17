"""Pretrain the two components of the digits world: a CLIP tower, and a language model that knows scenes from text alone.

    python -m moe_llava.digits.pretrain tower OUT
    python -m moe_llava.digits.pretrain language-model OUT --level hard --width 96

Both are deterministic for a seed, a machine and a number of threads, and resume from OUT if they were stopped. They compute in bfloat16,
three times as fast on a CPU that supports it, with a float32 master copy of the weights; Muon trains hidden matrices, AdamW the others.

Shapes: B rows, S sequence, N labelled positions.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe_llava.digits.base import pixel_values
from moe_llava.digits.questions import Question, ask_existence, families, sample_questions, unique_items
from moe_llava.digits.scenes import LEVELS, STANDARD, Item, Level, Scene, handwriting, render, sample_scene
from moe_llava.digits.tokenizer import build_tokenizer

CURRICULUM_SHARE = 0.3  # of the tower's steps: one digit first, then two, up to the most of a scene
CARD_STEPS = 350
CARDS = 16  # in a row
TOWER_SAVE_STEPS, TEXT_SAVE_STEPS = 500, 250
STATE = "pretraining.pt"
WIDTH, HEAD = 160, 32  # of the shipped language model, and of a head of attention


class MasterWeights:
    """Optimizers that train a bfloat16 model through float32 copies of its parameters."""

    def __init__(self, model: nn.Module, muon_rate: float, adam_rate: float):
        self.model = model
        self.master = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
        is_hidden = {name: p.ndim == 2 and "embed" not in name for name, p in self.master.items()}
        hidden, other = ([p for name, p in self.master.items() if is_hidden[name] == kind] for kind in (True, False))
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=muon_rate, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(other, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [muon_rate, adam_rate]
        model.bfloat16()

    def load(self, master: dict[str, Tensor], optimizers: list[dict[str, Any]]) -> None:
        """Restore the weights, and the states of the optimizers."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.master[name].copy_(master[name])
                parameter.copy_(master[name])
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(state)

    def step(self, loss: Tensor, progress: float) -> None:
        """Take a step. `progress` 0..1 sets the rates: a short warm-up, a constant half, a linear decay."""
        loss.backward()
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None, name
            self.master[name].grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(list(self.master.values()), 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (progress + 1e-3) / 0.02, max(0.02, (1 - progress) / 0.5))
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.master[name])


class Saved:
    """What is saved in a folder: the model, as `save_pretrained` does, and STATE, from which the same command resumes.

    `settings`: what the command is about. A state of others raises SystemExit, and so does a complete pretraining.
    """

    def __init__(self, out: Path, model: PreTrainedModel, weights: MasterWeights, rng: random.Random, settings: dict[str, Any]):
        self.out, self.model, self.weights, self.rng, self.settings = out, model, weights, rng, settings

    def resume(self) -> int:
        """Restore weights, optimizers and random numbers; return the number of steps that are done."""
        if not (self.out / STATE).exists():
            if (self.out / "pretraining.json").exists():
                raise SystemExit(f"{self.out} is complete: choose another folder")
            return 0
        state = torch.load(self.out / STATE, weights_only=True)
        if state["settings"] != self.settings:
            raise SystemExit(f"{self.out / STATE} is of {state['settings']}, but this command of {self.settings}: choose another folder")
        self.weights.load(state["master"], state["optimizers"])
        self.rng.setstate(state["random"])
        torch.set_rng_state(state["torch"])
        print(f"{self.out / STATE}: resuming after step {state['step']}", flush=True)
        return int(state["step"])

    def save(self, step: int) -> None:
        """Save after `step` steps."""
        self.model.save_pretrained(self.out)
        optimizers = [optimizer.state_dict() for optimizer in self.weights.optimizers]
        state = {"settings": self.settings, "step": step, "master": self.weights.master, "optimizers": optimizers}
        unfinished = self.out / f"{STATE}.part"
        torch.save(state | {"random": self.rng.getstate(), "torch": torch.get_rng_state()}, unfinished)
        unfinished.replace(self.out / STATE)

    def finish(self, report: dict[str, float]) -> None:
        """Write the final scores, and delete the state."""
        (self.out / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n")
        (self.out / STATE).unlink()


def digits_allowed(progress: float, most: int) -> int:
    """Return how many digits a scene may hold after `progress` (0..1) of the training, of `most` in the end: the curriculum."""
    return min(most, 1 + int(progress / CURRICULUM_SHARE * most))


def steps_with_progress(done: int, steps: int, what: str) -> Iterator[tuple[int, float]]:
    """Yield the steps after the first `done`, each with what is done by then, 0..1."""
    start = time.monotonic()
    for step in range(done, steps):
        yield step, step / steps
        if step % 50 == 49:
            seconds = time.monotonic() - start
            left = seconds / (step + 1 - done) * (steps - step - 1)
            print(f"{what}: step {step + 1}/{steps}, {seconds:.0f} s, {left:.0f} s left", flush=True)


def _vocabulary(level: Level) -> dict[str, int]:
    tokenizer = build_tokenizer(level)
    return {"vocab_size": len(tokenizer)} | {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


# --- the tower


def tower_config(level: Level = STANDARD) -> CLIPConfig:
    text = {
        **_vocabulary(level),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": level.canvas,
        "patch_size": 8,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)


def sibling(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with one digit's value or colour changed: its caption is the hardest to distinguish."""
    index = rng.randrange(len(scene.items))
    while True:
        old = scene.items[index]
        new = replace(old, digit=rng.randrange(10)) if rng.random() < 0.7 else replace(old, colour=rng.choice(scene.level.colours))
        others: list[Item] = [item for item in scene.items if item is not old]
        if new != old and all((new.digit, new.colour) != (item.digit, item.colour) for item in others):
            return Scene(tuple(sorted([*others, new], key=lambda item: item.cell)))


def pretrain_tower(steps: int, seed: int, out: Path, pairs: int = 96, level: Level = STANDARD) -> None:
    """Pretrain a tower contrastively (CLIP, arXiv 2103.00020) on `pairs` scenes and as many siblings a step, with handwriting of the
    training split only. `out`: see Saved."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer(level)
    model = CLIPModel(tower_config(level))
    weights = MasterWeights(model, muon_rate=0.01, adam_rate=2e-3)
    saved = Saved(out, model.vision_model, weights, rng, {"part": "tower", "steps": steps, "seed": seed, "level": level.name})
    for step, progress in steps_with_progress(saved.resume(), steps, "tower"):
        scenes = [sample_scene(rng, level, (1, digits_allowed(progress, level.digits[1]))) for _ in range(pairs)]
        scenes += [sibling(scene, rng) for scene in scenes]
        text = tokenizer([f"<s> {scene.caption} </s>" for scene in scenes], padding=True, padding_side="right", return_tensors="pt")
        pixels = pixel_values([render(scene, rng, "train") for scene in scenes]).bfloat16()
        logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pixels).logits_per_image.float()
        # A caption may occur twice; then both images match both captions.
        captions = [scene.caption for scene in scenes]
        target = torch.tensor([[float(a == b) for b in captions] for a in captions])
        target = target / target.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        weights.step(loss, progress)
        if step % 100 == 99:
            print(f"tower: loss {loss.item():.3f}", flush=True)
        if (step + 1) % TOWER_SAVE_STEPS == 0 or step == steps - 1:
            print(f"tower: linear probe reads {probe_tower(model, level):.1%} of unseen digits", flush=True)
            saved.save(step + 1)
    saved.finish({"linear_probe": probe_tower(model, level)})


@torch.no_grad()
def probe_tower(model: CLIPModel, level: Level = STANDARD, scenes: int = 1500) -> float:
    """Return the accuracy, on unseen handwriting, of a linear classifier that predicts a digit from the four patches of its cell in the
    second-last layer."""
    from sklearn.linear_model import LogisticRegression

    features: dict[str, tuple[Tensor, list[int]]] = {}
    grid = level.grid
    for split in ("train", "test"):
        rng = random.Random(7)
        drawn = [sample_scene(rng, level) for _ in range(scenes)]
        hidden_BPD = (
            model.vision_model(
                pixel_values=pixel_values([render(scene, rng, split) for scene in drawn]).to(model.dtype), output_hidden_states=True
            )
            .hidden_states[-2][:, 1:]
            .float()
        )
        rows = hidden_BPD.view(len(drawn), grid, 2, grid, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(len(drawn), grid * grid, -1)
        items = [(index, item) for index, scene in enumerate(drawn) for item in scene.items]
        features[split] = (torch.stack([rows[index, item.cell] for index, item in items]), [item.digit for _, item in items])
    probe = LogisticRegression(max_iter=300, C=0.1).fit(features["train"][0].numpy(), features["train"][1])
    return float(probe.score(features["test"][0].numpy(), features["test"][1]))


# --- the language model


def language_model_config(width: int = WIDTH, level: Level = STANDARD) -> LlamaConfig:
    """Return the configuration of a language model whose shape is that of the shipped one, of another width: a multiple of HEAD."""
    return LlamaConfig(
        **_vocabulary(level),
        hidden_size=width,
        intermediate_size=16 * round(2.7 * width / 16),
        num_hidden_layers=6,
        num_attention_heads=width // HEAD,
        initializer_range=round(width**-0.5, 2),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def text_scene(scene: Scene) -> str:
    """Return the scene as text, in one canonical wording: the words of a digit are adjacent, as an image patch shows them together."""
    return " , ".join(f"{item.name} {item.position}" for item in scene.items) + " ."


def flash_cards(scene: Scene, rng: random.Random, number: int) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs of a single look-up: "colour 7" -> "red", "where red 7" -> "top-left"."""
    unique_digit, unique_colour = unique_items(scene, "digit"), unique_items(scene, "colour")
    cards: list[tuple[str, str]] = []
    while len(cards) < number:
        item = rng.choice(scene.items)
        match rng.randrange(5):
            case 0 if item in unique_digit:
                cards += [(f"colour {item.digit}", item.colour), (f"where {item.digit}", item.position)]
            case 1 if item in unique_colour:
                cards.append((f"digit {item.colour}", str(item.digit)))
            case 2:
                cards.append((f"where {item.name}", item.position))
            case 3:
                cards += [(f"digit {item.position}", str(item.digit)), (f"colour {item.position}", item.colour)]
            case 4:
                question = ask_existence(scene, rng, rng.choice(["positive", "adversarial"]))
                if question is not None:
                    cards.append((question.text.removesuffix(" ?").replace("there a ", ""), question.answer))
    return cards[:number]


class TextScenes:
    """Encodes rows: a scene as text, followed by flash cards, or by questions and answers in the chat template."""

    def __init__(self, level: Level = STANDARD) -> None:
        self.level, self.tokenizer = level, build_tokenizer(level)

    def encode(self, scene: Scene, questions: list[Question]) -> tuple[list[int], list[int]]:
        """Return (input_ids, labels) of one row; labels are -100 except for the answers."""
        messages = [
            message
            for question in questions
            for message in ({"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer})
        ]
        messages[0]["content"] = f"{text_scene(scene)} {messages[0]['content']}"
        row = self.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        labels = [token if is_label else -100 for token, is_label in zip(row["input_ids"], row["assistant_masks"], strict=True)]
        return row["input_ids"], labels

    def encode_cards(self, scene: Scene, rng: random.Random) -> tuple[list[int], list[int]]:
        """Return (input_ids, labels) of one row of flash cards."""
        ids = self.tokenizer.encode(f"<s> user: {text_scene(scene)}")
        labels = [-100] * len(ids)
        for prompt, answer in flash_cards(scene, rng, CARDS):
            prompt_ids, answer_ids = self.tokenizer.encode(prompt), self.tokenizer.encode(answer)
            ids += prompt_ids + answer_ids
            labels += [-100] * len(prompt_ids) + answer_ids
        return ids, labels

    def questions(self, rng: random.Random, rows: int, number: int) -> tuple[Tensor, Tensor, list[list[Question]]]:
        """Return input_ids and labels [B, S] of `rows` scenes of any size with `number` questions each, and the questions."""
        scenes = [sample_scene(rng, self.level) for _ in range(rows)]
        questions = [sample_questions(scene, rng, number) for scene in scenes]
        return *pad([self.encode(scene, row) for scene, row in zip(scenes, questions, strict=True)]), questions

    def cards(self, rng: random.Random, rows: int) -> tuple[Tensor, Tensor]:
        """Return input_ids and labels [B, S] of `rows` full scenes with flash cards. In small scenes, guesses are too often right."""
        most = self.level.digits[1]
        scenes = [sample_scene(rng, self.level, (most, most)) for _ in range(rows)]
        return pad([self.encode_cards(scene, rng) for scene in scenes])


def pad(encoded: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Return input_ids and labels [B, S], padded on the right."""
    ids_BS = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in encoded], batch_first=True, padding_value=0)
    labels_BS = nn.utils.rnn.pad_sequence([torch.tensor(labels) for _, labels in encoded], batch_first=True, padding_value=-100)
    return ids_BS, labels_BS


def pretrain_language_model(
    steps: int,
    seed: int,
    out: Path,
    rows: int = 64,
    questions: int = 6,
    width: int = WIDTH,
    level: Level = STANDARD,
) -> None:
    """Train on answers about scenes given as text: first flash cards, which teach to bind a digit to its colour and place, then `questions`
    questions about each of `rows` scenes a step. `out`: see Saved."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    text = TextScenes(level)
    # The backward pass of sdpa is slow on a CPU.
    model = LlamaForCausalLM._from_config(language_model_config(width, level), attn_implementation="eager")
    weights = MasterWeights(model, muon_rate=0.01, adam_rate=2e-3)
    settings = {"part": "language-model", "steps": steps, "seed": seed, "level": level.name, "width": width}
    saved = Saved(out, model, weights, rng, settings)
    for step, progress in steps_with_progress(saved.resume(), steps, "language model"):
        ids_BS, labels_BS = text.cards(rng, rows) if step < CARD_STEPS else text.questions(rng, rows, questions)[:2]
        hidden_BSD = model.model(input_ids=ids_BS, attention_mask=(ids_BS != 0).long()).last_hidden_state
        targets_BS = labels_BS[:, 1:]
        labelled_BS = targets_BS != -100
        logits_NV = model.lm_head(hidden_BSD[:, :-1][labelled_BS]).float()
        loss = F.cross_entropy(logits_NV, targets_BS[labelled_BS])
        weights.step(loss, progress)
        if step % 100 == 99:
            print(f"language model: loss {loss.item():.3f}", flush=True)
        if (step + 1) % TEXT_SAVE_STEPS == 0 or step == steps - 1:
            scores = ", ".join(f"{family} {score:.1%}" for family, score in text_accuracy(model, level).items())
            print(f"language model: {scores}", flush=True)
            saved.save(step + 1)
    saved.finish(text_accuracy(model, level))


@torch.no_grad()
def text_accuracy(model: LlamaForCausalLM, level: Level = STANDARD, rows: int = 500, seed: int = 7) -> dict[str, float]:
    """Return the accuracy from text, per family and over "all": the share of questions whose answer tokens are all predicted."""
    text, names = TextScenes(level), list(families(level))
    ids_BS, labels_BS, rows_of_questions = text.questions(random.Random(seed), rows, len(names))
    right_BS = model(input_ids=ids_BS, attention_mask=(ids_BS != 0).long()).logits[:, :-1].argmax(-1) == labels_BS[:, 1:]
    scores: dict[str, list[bool]] = {family: [] for family in [*names, "all"]}
    for right_S, labels_S, questions in zip(right_BS, labels_BS[:, 1:], rows_of_questions, strict=True):
        # An answer starts where a label follows none; the tokens of answer number n have the id n.
        is_label_S = labels_S != -100
        starts_S = is_label_S & ~torch.cat([torch.tensor([False]), is_label_S[:-1]])
        answers_S = starts_S.cumsum(0) * is_label_S
        assert answers_S.max() == len(questions)
        for number, question in enumerate(questions, start=1):
            correct = bool(right_S[answers_S == number].all())
            scores[question.family].append(correct)
            scores["all"].append(correct)
    return {family: sum(values) / len(values) for family, values in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tower", "language-model"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", choices=LEVELS, default=STANDARD.name)
    parser.add_argument("--width", type=int, help=f"of the language model, a multiple of {HEAD}; default: {WIDTH}")
    arguments = parser.parse_args()
    width, level = arguments.width or WIDTH, LEVELS[arguments.level]
    if arguments.part == "tower" and arguments.width is not None:
        parser.error("--width is for the language model; all towers have one width")
    if width < HEAD or width % HEAD:
        parser.error(f"--width is {width}, but must be a multiple of {HEAD}, the width of a head of attention")
    handwriting("train")
    if arguments.part == "tower":
        pretrain_tower(arguments.steps or 2500, arguments.seed, arguments.out, level=level)
    else:
        pretrain_language_model(arguments.steps or 2200, arguments.seed, arguments.out, width=width, level=level)
    print((arguments.out / "pretraining.json").read_text())


if __name__ == "__main__":
    main()
