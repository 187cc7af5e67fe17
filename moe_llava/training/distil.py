"""Distillation: stage III also trains the model to give each next token the probability that a frozen teacher gives it (Hinton et al.,
arXiv 1503.02531; for sparse vision-language models, the mimic distillation of LLaVA-MoD, arXiv 2408.15881).

    loss = (1 - weight) * CE + weight * temperature^2 / N * sum over the N labels of a step of KL(p || q) + the routers' losses
    p = softmax(the teacher's logits / temperature),   q = softmax(the model's logits / temperature)

Unusual here:
- Teacher and model encode a record each with its own processor, so images may have other numbers of tokens. What is compared is the
  prediction of the first label, of the second, and so on; positions do not matter.
- With `top_k`, the cache has of each label the k most probable tokens of the teacher, and the sum of all other probabilities. The KL is
  then over k + 1 events: each of these tokens, and "any other token". It is at most the KL over all tokens, because merging outcomes loses
  information. If k is the number of tokens, no other token is left, and both are equal.
- The teacher's probabilities are those over the tokens of the model: some families pad the rows of their embedding tables. A token that
  only the model has gets the probability 0.
- To fill the cache, the teacher computes one record at a time. So an entry has the same bits whenever, and by whatever process, it is made.

Shapes: S sequence, N labels, V tokens, K tokens kept, E events: V or K tokens, or K + 1 with the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from moe_llava.checkpoints.files import check_checkpoint, resolve
from moe_llava.checkpoints.load import check_vocabulary, check_weights, load_config, load_model, load_processor
from moe_llava.common.errors import DataError
from moe_llava.common.files import file_digest
from moe_llava.common.progress import with_bar
from moe_llava.data.batches import Collator, ConversationDataset
from moe_llava.data.encoder import Encoder
from moe_llava.data.files import StoredImage
from moe_llava.data.records import IMAGE_TOKEN, Record
from moe_llava.data.store import Records
from moe_llava.data.stream import Stream
from moe_llava.model.losses import IGNORED, logits_at_labels
from moe_llava.training.features import read_entry, write_entry
from moe_llava.training.labels import count_shared, predicted
from moe_llava.training.recipe import Distillation, RecipeError
from moe_llava.training.stage import Stage

CACHE = "teacher"  # a folder in a recipe's output, which the dense baseline uses too
_READ = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin")  # files of a checkpoint that decide on its outputs
_EXAMPLE = Record("a test conversation", ((f"{IMAGE_TOKEN}\nWhat is this?", "It is a test, in 2 parts."),), (Path(),))


def check_teacher(stage: Stage, settings: Distillation, model: PreTrainedModel, encoder: Encoder) -> Encoder:
    """Return the encoder of the teacher of `stage`, whose model, which may be on the meta device, and whose encoder are given.

    Raises CheckpointError if the teacher does not exist, is no vision-language model, or has other ids for tokens of the model; RecipeError
    if it has fewer tokens than `top_k`; DataError if its processor makes other labels of a conversation.
    """
    name = settings.teacher
    check_checkpoint(name, plain=True)
    check_weights(name)
    taught = teacher_encoder(stage, settings)
    taught.check_processor()
    vocabulary = encoder.tokenizer.get_vocab()
    # The placeholders of images are no labels, and families choose their own.
    check_vocabulary(name, taught.tokenizer.get_vocab(), "the model of the stage", vocabulary, vocabulary.keys() - set(encoder.reserved))
    tokens = min(vocabulary_size(model.config), vocabulary_size(load_config(name)))
    if settings.top_k is not None and settings.top_k > tokens:
        raise RecipeError(f"stage3.distillation.top_k is {settings.top_k}, but must be at most the size of the vocabulary, {tokens}")
    own, theirs = (
        torch.tensor(Encoder(each.processor, each.template).measure(_EXAMPLE, [(640, 480)])[0]["labels"]) for each in (encoder, taught)
    )
    count_shared(predicted(own), predicted(theirs), _EXAMPLE.source, f"the teacher {name}")
    return taught


def vocabulary_size(config: Any) -> int:
    """Return the number of a model's logits."""
    return int(config.get_text_config().vocab_size)


def teacher_encoder(stage: Stage, settings: Distillation) -> Encoder:
    """Return the encoder of the teacher: with its own processor, and the stage's chat template if it names one. No record is cut: what the
    model sees of a record decides which labels count."""
    return Encoder(load_processor(settings.teacher), stage.settings.template)


@dataclass(frozen=True)
class Teacher:
    """The frozen model. `tokens`: V, the number of the trained model's logits."""

    model: PreTrainedModel
    temperature: float
    tokens: int

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        """Return log p [N, V], or fewer tokens if the teacher has fewer, for the labels of a batch, row by row."""
        inputs = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }
        at_labels = logits_at_labels(inputs.pop("labels"))
        logits_BKV = self.model(**inputs, logits_to_keep=at_labels["logits_to_keep"], use_cache=False).logits
        logits_NV = logits_BKV[at_labels["shift_labels"] != IGNORED][:, : self.tokens]
        return (logits_NV.float() / self.temperature).log_softmax(dim=-1)


def load_teacher(stage: Stage, settings: Distillation, tokens: int) -> Teacher:
    """Return the teacher in evaluation mode, on the device of this process, in the precision in which the stage computes."""
    model = load_model(settings.teacher, _dtype(stage), attn_implementation=stage.recipe.attention)
    return Teacher(model.requires_grad_(False).to(PartialState().device), settings.temperature, tokens)


def _dtype(stage: Stage) -> torch.dtype:
    return torch.bfloat16 if stage.bf16 else torch.float32


def to_events(log_p_NV: Tensor, top_k: int) -> dict[str, Tensor]:
    """Return the `ids` [N, K] of the `top_k` most probable tokens, and `log_probs` [N, E]: theirs, and that of all others together if there
    are any."""
    log_p_NK, ids_NK = log_p_NV.topk(top_k, dim=-1)
    parts = [log_p_NK] + ([_others(log_p_NV, ids_NK)] if top_k < log_p_NV.shape[-1] else [])
    return {"ids": ids_NK.int(), "log_probs": torch.cat(parts, dim=-1)}


def _others(log_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Return [N, 1]: the logarithm of the probability of all tokens but `ids`."""
    return log_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(dim=-1, keepdim=True)


def divergence(logits_NV: Tensor, taught: dict[str, Tensor], temperature: float) -> Tensor:
    """Return the sum over the labels of KL(p || q), with q from the logits of the trained model.

    taught: `log_probs`, log p [N, E] of each token from id 0 on, or as `to_events` returns it, with `ids`.
    """
    log_q_NV, log_p_NE = (logits_NV.float() / temperature).log_softmax(dim=-1), taught["log_probs"]
    if "ids" in taught:
        ids_NK = taught["ids"].long()
        log_q_NE = log_q_NV.gather(-1, ids_NK)
        if log_p_NE.shape[-1] > ids_NK.shape[-1]:
            log_q_NE = torch.cat([log_q_NE, _others(log_q_NV, ids_NK)], dim=-1)
    else:
        log_q_NE = log_q_NV[:, : log_p_NE.shape[-1]]
    return F.kl_div(log_q_NE, log_p_NE, reduction="sum", log_target=True)


class LiveInputs:
    """Make the inputs of a live teacher from a record, with its own encoder."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.collate: Callable[[list[Any]], dict[str, Any]] = Collator(encoder.nothing())

    def __call__(self, record: Record, labels_S: Tensor) -> dict[str, Tensor]:
        """Return the teacher's inputs, with the labels that the model has of the record. Raises DataError as `count_shared` does."""
        item = self.encoder(record)
        labels = item["labels"].clone()
        number = count_shared(predicted(labels_S), predicted(labels), record.source, "the teacher")
        at = (labels[1:] != IGNORED).nonzero().squeeze(1) + 1
        labels[at[number:]] = IGNORED
        return item | {"labels": labels}


class TeacherCache:
    """Events of records on disk, each in a file that is named by a digest of the record: its text, and the names, sizes and times of its
    files. `folder` belongs to one teacher with one set of settings: see `cache_folder`."""

    def __init__(self, folder: Path, top_k: int, tokens: int):
        self.folder = folder
        self.stamps: dict[Path, str] = {}
        self.nothing = {
            "ids": torch.zeros(0, top_k, dtype=torch.int32),
            "log_probs": torch.zeros(0, top_k + (top_k < tokens)),
        }

    def __call__(self, record: Record, labels_S: Tensor) -> dict[str, Tensor]:
        """Return the events of the record's labels. Raises DataError as `count_shared` does, or if there is no entry."""
        file = self.file_of(record)
        if not file.is_file():
            raise DataError(f"{record.source}: the cache of the teacher has no {file}: its files have changed, or the teacher refused it")
        entry = read_entry(file, torch.device("cpu"))
        number = count_shared(predicted(labels_S).int(), entry.pop("labels"), record.source, "the teacher")
        return {name: values[:number] for name, values in entry.items()}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([item[name] for item in items or [self.nothing]]) for name in self.nothing}

    def file_of(self, record: Record) -> Path:
        stored = {image.folder for image in record.images if isinstance(image, StoredImage)}
        stamps = [*map(_stamp, record.files), *(self._stamps_of(folder) for folder in sorted(stored))]
        described = [record.system, record.turns, list(map(str, record.images)), stamps]
        name = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _stamps_of(self, stored: Path) -> str:
        """Return a digest of the stamps of a Parquet file, or of all files of a folder of `datasets`, taken once: many records share it."""
        if stored not in self.stamps:
            files = [stored] if stored.is_file() else sorted(part for part in stored.rglob("*") if part.is_file())
            self.stamps[stored] = hashlib.sha256("\n".join(map(_stamp, files)).encode()).hexdigest()
        return self.stamps[stored]

    def fill(self, records: Sequence[Record], encoder: Encoder, load: Callable[[], Teacher], skip: bool) -> None:
        """Write the entries of `records` that are missing, shared out among the processes. `load` is called if there are any. A record that
        the encoder refuses is left out with `skip`; without, DataError is raised in all processes."""
        state, teacher, problem = PartialState(), None, None
        collate, top_k = Collator(encoder.nothing()), self.nothing["ids"].shape[1]
        numbers = range(state.process_index, len(records), state.num_processes)
        for index in with_bar(numbers, "the teacher's predictions"):
            record = records[index]
            try:
                file = self.file_of(record)
                if file.is_file():
                    continue
                item = encoder(record)
            except (DataError, OSError) as error:
                problem = problem or str(error)
                if skip:
                    continue
                break
            teacher = teacher or load()
            events = to_events(teacher(collate([item])), top_k)
            write_entry(file, {"labels": predicted(item["labels"]).int(), **{name: value.cpu() for name, value in events.items()}})
        problems = [found for found in gather_object([problem]) if found]  # also waits for the others
        if problems and not skip:
            raise DataError(problems[0])


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


def cache_folder(stage: Stage, settings: Distillation, tokens: int) -> Path:
    """Return the folder for the entries of a teacher: named by a digest of its files, and of what else decides on an entry."""
    names: list[str | None] = [None]
    state = PartialState()
    if state.is_main_process:
        folder = resolve(settings.teacher, with_weights=True)
        files = {file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.suffix in _READ}
        how = [
            settings.temperature,
            settings.top_k,
            tokens,
            stage.settings.template,
            stage.recipe.attention,
            str(_dtype(stage)),
            state.device.type,
        ]
        names = [hashlib.sha256(json.dumps([files, how]).encode()).hexdigest()[:16]]
    broadcast_object_list(names)
    assert names[0] is not None
    return Path(stage.recipe.output) / CACHE / names[0]


def prepare_teacher(
    stage: Stage, settings: Distillation, records: Records | Stream, tokens: int
) -> tuple[LiveInputs | TeacherCache, Teacher | None]:
    """Return (what makes the teacher's part of an item, the teacher if it is live). A cache is filled first."""
    encoder = teacher_encoder(stage, settings)
    if settings.top_k is None:
        return LiveInputs(encoder), load_teacher(stage, settings, tokens)
    theirs = min(tokens, vocabulary_size(load_config(settings.teacher)))
    cache = TeacherCache(cache_folder(stage, settings, tokens), settings.top_k, theirs)
    assert isinstance(records, Records), "a recipe with a stream has no cache"
    cache.fill(records, encoder, lambda: load_teacher(stage, settings, tokens), stage.recipe.on_bad_record == "skip")
    return cache, None


class TaughtDataset(ConversationDataset):
    """Records whose items also have `teacher`: what `teach` makes of a record and of its labels."""

    def __init__(self, records: Sequence[Record] | Stream, encoder: Encoder, teach: LiveInputs | TeacherCache):
        super().__init__(records, encoder)
        self.teach = teach

    def encode(self, record: Record) -> dict[str, Any]:
        item = super().encode(record)
        return item | {"teacher": self.teach(record, item["labels"])}


@dataclass(frozen=True)
class TaughtCollator:
    """Collate items of TaughtDataset: the model's part with `own`, the teacher's, of the same records in the same order, apart. It is never
    packed, as rows of labels are in the same order all the same."""

    own: Collator
    teach: LiveInputs | TeacherCache

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        taught = [item["teacher"] for item in items if "problem" not in item]
        batch = self.own([{name: value for name, value in item.items() if name != "teacher"} for item in items])
        return batch | {"teacher": self.teach.collate(taught)}
