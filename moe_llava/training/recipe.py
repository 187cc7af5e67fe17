"""A recipe: one YAML file that says what is trained on what, and how. All its problems are reported at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moe_llava.data.files import is_stream
from moe_llava.data.templates import TEMPLATES
from moe_llava.model.options import MoeOptions
from moe_llava.training.parsing import RecipeError, apply_override, build, read

if TYPE_CHECKING:
    Template = str
    MoeSection = MoeOptions
else:
    Template = Literal[tuple(TEMPLATES)]
    # MoeOptions in which None means that an option is not given.
    MoeSection = make_dataclass("MoeSection", [(name, kind | None, None) for name, kind in get_type_hints(MoeOptions).items()])
Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
SHUFFLE_BUFFER = 1000
ADAPTER_TARGETS = ("attention", "FFN", "experts", "routers")


@dataclass
class Data:
    """A data file, and the folder that its image names are relative to. `weight`: how often an epoch uses each record; 0.5 takes half of
    them, chosen by the recipe's seed, 2 takes all of them twice.

    Or shards that hold their images, as `is_stream` knows them. `shuffle_buffer`: records that are shuffled together; None is
    SHUFFLE_BUFFER."""

    file: str
    images: str = ""  # missing for shards alone
    weight: PositiveFloat = 1.0
    shuffle_buffer: PositiveInt | None = None


@dataclass
class Optimisation:
    """AdamW with warm-up and cosine decay. `batch_size`: samples per step, of all processes and accumulation steps together."""

    learning_rate: PositiveFloat
    batch_size: PositiveInt
    per_device_batch_size: PositiveInt
    epochs: PositiveFloat = 1.0
    max_steps: Literal[-1] | PositiveInt = -1  # above 0: stop there, whatever `epochs` says
    warmup_ratio: Share = 0.03
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    group_by_length: bool = False  # batches of one modality and about one length; else records come in random order
    packing: bool = False  # concatenate the samples of a device's batch in one row without padding; they do not attend to each other


@dataclass
class Adapter:
    """LoRA on parts of the language model (ADAPTER_TARGETS; routers are trained in full); the rest is frozen. `quantisation` applies to the
    frozen linear layers, and with `quantise_experts` to the experts. `continue_from`: an adapter folder to continue from; the stage then
    starts from that adapter's base, and not from the stage before."""

    targets: list[str]
    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: Share = 0.0
    use_dora: bool = False
    quantisation: Literal["nf4", "int8"] | None = None
    quantise_experts: bool = False
    continue_from: str | None = None


@dataclass
class Parts:
    """The parts that a dense LLaVA is joined from, each a folder or hub id; the language model may also be a GGUF file.

    template: its chat template, a key of TEMPLATES in data/templates.py; None keeps the tokenizer's own.
    image_size: of the square image that the tower sees, in pixels; None is the tower's own. The position embeddings are interpolated.
    """

    language_model: str
    vision_tower: str
    template: Template | None = None
    image_size: PositiveInt | None = None


@dataclass
class StageSettings:
    """Settings of every stage.

    data: one file, or several, or a stream of shards.
    template: the chat template, a key of TEMPLATES in data/templates.py; None is the processor's own.
    max_length: tokens, those of images included, after which a record is cut; None cuts nothing.
    image_aspect_ratio: "pad" pads images to a square with the tower's mean colour, "square" resizes and crops them as the tower's
        preprocessing does; None leaves the processor as it is.
    image_processor: settings of the image processor, such as `max_pixels` or `size`, which decide on the number of tokens of an image. The
        finished stage keeps them.
    video_processor: settings of the video processor, such as `fps`, `num_frames` or `size`, in the same way.
    adapter: what is trained instead of the stage's own parameters; None trains these in full.
    """

    data: Data | Annotated[list[Data], Field(min_length=1)]
    optimisation: Optimisation
    template: Template | None = None
    max_length: PositiveInt | None = None
    image_aspect_ratio: Literal["pad", "square"] | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)
    video_processor: dict[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None

    @property
    def sources(self) -> list[Data]:
        return self.data if isinstance(self.data, list) else [self.data]

    @property
    def stream(self) -> Data | None:
        """The shards that the stage is trained on, if it is trained on a stream."""
        return next((source for source in self.sources if is_stream(source.file)), None)


@dataclass
class Distillation:
    """The loss is (1 - weight) * cross entropy + weight * temperature^2 * KL(teacher || model), with the logits of both divided by
    `temperature` in the KL.

    teacher: a folder or hub id of a vision-language model with the same vocabulary.
    top_k: cache the teacher's `top_k` most probable tokens of each label in `output` before training; None keeps the teacher in memory,
        and compares all tokens.
    """

    teacher: str
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None


@dataclass
class SparseStageSettings(StageSettings):
    """Stage III.

    moe: the options of experts that are made here; those that are not given take their defaults. For a model with experts of its own, those
        that its configuration has: `router_aux_loss_coef`.
    tuned: train experts and routers, or all that stage II trains, too.
    expert_start: experts begin as copies of their FFN, as copies with noise, or with columns drawn anew; see `upcycle`.
    experts_from: checkpoints that each give one expert, instead of copies of one FFN; see `upcycle`.
    dense: train the FFNs that would have become experts as they are, the baseline, with the same steps and data.
    distillation: learn from the probabilities of a teacher, too.
    """

    moe: MoeSection | None = None
    tuned: Literal["experts", "all"] = "experts"
    expert_start: Literal["copy", "noise", "drop"] = "copy"
    experts_from: list[str] = field(default_factory=list)
    dense: bool = False
    distillation: Distillation | None = None

    @property
    def options(self) -> MoeOptions:
        """The options of experts that are made here, complete."""
        return MoeOptions(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """The options that the recipe gives."""
        return {name: value for name, value in asdict(self.moe).items() if value is not None} if self.moe else {}


@dataclass
class Sharding:
    """FSDP2: each of the `fsdp_size` processes keeps its part of every parameter, gradient and moment. With `ep_size` above 1 the experts
    of stage III stay whole: they are divided among groups of `ep_size` processes, and tokens travel to them."""

    fsdp_size: Annotated[int, Field(ge=2)]
    ep_size: PositiveInt = 1


@dataclass
class Recipe:
    """All settings of a run.

    model: a folder or hub id of a vision-language model with its processor, dense, or with experts for stage III alone; or the parts that a
        dense LLaVA is joined from. The first stage of the recipe starts from it.
    precision: "bf16" computes in bfloat16 with float32 weights, "auto" does so where the machine is fast at it.
    on_bad_record: a record that cannot be read stops the run, or is left out.
    report_to: services of transformers' Trainer that draw curves, such as tensorboard, trackio, wandb.
    save_total_limit: how many saves are kept, the last ones. keep_saves: also when the stage is finished, as checkpoints of steps.
    feature_cache: a folder in which the tower's features of an image are kept, for epochs, stages and runs to come; None computes them each
        time.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # nan passes every comparison with a bound

    model: str | Parts
    output: str
    stage3: SparseStageSettings
    stage1: StageSettings | None = None  # absent, like stage2, where the model is aligned already
    stage2: StageSettings | None = None
    seed: Seed = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    attention: str | None = None  # an attention implementation of transformers; None is its default
    torch_compile: bool = False
    on_bad_record: Literal["stop", "skip"] = "stop"
    report_to: list[str] = field(default_factory=list)
    sharding: Sharding | None = None  # None: every process keeps the whole model
    logging_steps: PositiveInt = 10
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt = 1
    keep_saves: bool = False
    dataloader_workers: Annotated[int, Field(ge=0)] = 0
    feature_cache: str | None = None

    @property
    def stages(self) -> dict[int, StageSettings]:
        """The settings of each stage that the recipe has, by its number."""
        return {number: stage for number, stage in ((1, self.stage1), (2, self.stage2), (3, self.stage3)) if stage is not None}

    def settings_of(self, number: int) -> StageSettings:
        """Return the settings of a stage. Raises RecipeError if the recipe does not have it."""
        if number not in self.stages:
            raise RecipeError(f"the recipe has no stage{number}")
        return self.stages[number]


def load_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe. `overrides` are "a.b=value" with a YAML value. A recipe may name another one as its `base`, and hold only
    what differs.

    Raises RecipeError, with every problem found: file missing, unknown or missing keys, values of the wrong type or out of bounds; then
    settings that do not fit together.
    """
    recipe = read_recipe(file, overrides)
    _raise(file, _conflicts(recipe))
    return recipe


def check_processes(recipe: Recipe, processes: int, numbers: Iterable[int] = ()) -> None:
    """Raise RecipeError, with every problem found, if the sharding, or a batch of the stages `numbers`, does not fit so many processes."""
    problems = []
    if recipe.sharding and recipe.sharding.fsdp_size != processes:
        problems.append(
            f"sharding.fsdp_size is {recipe.sharding.fsdp_size}, but must be the number of processes that torchrun starts, {processes}"
        )
    for number in numbers:
        settings = recipe.settings_of(number).optimisation
        at_once = settings.per_device_batch_size * processes
        if settings.batch_size % at_once:
            problems.append(
                f"stage{number}.optimisation.batch_size is {settings.batch_size}, but must be a multiple of what all {processes} devices "
                f"compute at once, {at_once}"
            )
    if problems:
        raise RecipeError("\n".join(problems))


def read_recipe(file: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe without checking that its settings fit together: it may be the record of a past run."""
    raw = read(Path(file))
    problems: list[str] = []
    for override in overrides or []:
        apply_override(raw, override, problems)
    recipe = build(Recipe, raw, "", problems)
    _raise(file, problems)
    return recipe


def _raise(file: str | Path, problems: list[str]) -> None:
    if problems:
        raise RecipeError(f"{file}:\n" + "\n".join(f"  {problem}" for problem in problems))


def _conflicts(recipe: Recipe) -> list[str]:
    """Return a line for each rule between settings that is broken, and for each service in `report_to` that is not installed."""
    problems = []
    for number, settings in recipe.stages.items():
        batch_size, at_once = settings.optimisation.batch_size, settings.optimisation.per_device_batch_size
        if batch_size % at_once:
            where = f"stage{number}.optimisation.batch_size"
            problems.append(f"{where} is {batch_size}, but must be a multiple of per_device_batch_size={at_once}")
        problems += [f"stage{number}.{problem}" for problem in _data_conflicts(recipe, settings)]
        if settings.adapter is not None:
            problems += [f"stage{number}.adapter{problem}" for problem in _adapter_conflicts(settings, settings.adapter, number)]
    if isinstance(recipe.model, Parts) and recipe.stage1 is None:
        problems.append("model is joined from parts, whose projector is untrained, but stage1, which trains it, is missing")
    problems += [f"stage3.moe.{problem}" for problem in recipe.stage3.options.moe_problems()]
    if recipe.feature_cache is not None and "vision_tower" in recipe.stage3.options.moe_in:
        problems.append("feature_cache is set, but stage3.moe.moe_in has vision_tower, whose features change in training: leave it out")
    if recipe.report_to:
        from transformers.integrations import get_available_reporting_integrations  # takes seconds, and few recipes name any

        unknown = [name for name in recipe.report_to if name not in get_available_reporting_integrations()]
        problems += [f"report_to names {name!r}, which transformers does not know or which is not installed" for name in unknown]
    return problems if recipe.sharding is None else problems + _sharding_conflicts(recipe, recipe.sharding)


def _data_conflicts(recipe: Recipe, settings: StageSettings) -> list[str]:
    stream, optimisation = settings.stream, settings.optimisation
    if stream is None:
        problems = ["data.images is missing" for source in settings.sources if not source.images]
        if any(source.shuffle_buffer for source in settings.sources):
            problems.append("data.shuffle_buffer is set, but only shards are shuffled in a buffer: leave it out")
        return problems
    has, problems = f"is set, but data names a stream, {stream.file},", []
    if len(settings.sources) > 1:
        problems.append(f"data names a stream, {stream.file}, which must be a stage's only data, beside others")
    if stream.images:
        problems.append(f"data.images {has} whose shards hold their images: leave it out")
    if stream.weight != 1:
        problems.append(f"data.weight {has} which is read from its beginning to its end: leave it out")
    if optimisation.max_steps == -1:
        problems.append(f"optimisation.max_steps is needed, as the length of the stream {stream.file} is unknown: set a number of steps")
    if optimisation.group_by_length:
        problems.append(f"optimisation.group_by_length {has} whose lengths are unknown: leave it out")
    if recipe.feature_cache is not None:
        problems.append(
            f"data names a stream, {stream.file}, whose features would not fit on a disk, but feature_cache is set: leave it out"
        )
    if isinstance(settings, SparseStageSettings) and settings.distillation and settings.distillation.top_k:
        problems.append(f"distillation.top_k {has} whose predictions would not fit on a disk: leave it out for a live teacher")
    return problems


def _sharding_conflicts(recipe: Recipe, sharding: Sharding) -> list[str]:
    problems, num_experts = [], recipe.stage3.options.experts_per_layer
    if recipe.feature_cache is not None:
        problems.append("sharding is set, but so is feature_cache, for which one process needs the whole tower: leave one of them out")
    if any(settings.adapter for settings in recipe.stages.values()):
        problems.append("sharding is set, but so is an adapter, whose frozen base every process keeps as a whole: leave one of them out")
    if recipe.stage3.options.moe_in != ["language_model"]:
        problems.append(
            f"sharding is set, but stage3.moe.moe_in is {recipe.stage3.options.moe_in}: only experts of the language model are sharded"
        )
    if sharding.fsdp_size % sharding.ep_size:
        problems.append(f"sharding.ep_size is {sharding.ep_size}, but must divide fsdp_size={sharding.fsdp_size}")
    elif num_experts % sharding.ep_size:
        problems.append(f"sharding.ep_size is {sharding.ep_size}, but must divide the {num_experts} experts of a layer")
    return problems


def _adapter_conflicts(settings: StageSettings, adapter: Adapter, number: int) -> list[str]:
    if number == 1:
        return [" is set, but stage I trains only the projector, and in full: leave it out"]
    sparse = isinstance(settings, SparseStageSettings)
    problems, allowed = [], ADAPTER_TARGETS if sparse else ("attention", "FFN")
    if wrong := [target for target in adapter.targets if target not in allowed]:
        only = "" if sparse else "; only stage III has experts and routers"
        problems.append(f".targets names {', '.join(wrong)}, but must name some of {', '.join(allowed)}{only}")
    elif not set(adapter.targets) - {"routers"}:
        problems.append(f".targets is {adapter.targets}, but must name attention, FFN or experts: LoRA needs a matrix to adapt")
    if "experts" in adapter.targets and adapter.dropout:
        problems.append(
            f".dropout is {adapter.dropout}, but must be 0 with experts among the targets: "
            "LoRA is added to the stacked weights before they meet an input that could be dropped"
        )
    if "experts" in adapter.targets and adapter.use_dora:
        problems.append(".use_dora is true, but must be false with experts among the targets: PEFT has no DoRA for stacked weights")
    if adapter.quantise_experts and not (sparse and adapter.quantisation):
        rule = "needs quantisation, nf4 or int8" if sparse else "only stage III has experts"
        problems.append(f".quantise_experts is true, but {rule}")
    if isinstance(settings, SparseStageSettings):
        if settings.dense:
            problems.append(" is set, but stage3.dense is true, and the dense baseline trains its FFNs in full")
        if settings.tuned == "all":
            problems.append(" is set, but stage3.tuned is all, and an adapter's targets say what is trained: leave one of them out")
        if settings.options.moe_in != ["language_model"]:
            problems.append(f" is set, but stage3.moe.moe_in is {settings.options.moe_in}: adapters are for the language model alone")
        if settings.options.routing == "smoes":
            problems.append(" is set, but stage3.moe.routing is smoes, whose running statistics an adapter would not hold: leave it out")
        if settings.options.router_bias_rate and "routers" not in adapter.targets:
            problems.append(
                f".targets is {adapter.targets}, without routers, but stage3.moe.router_bias_rate is {settings.options.router_bias_rate}, "
                "and the bias, which moves in training, is saved with trained routers only: name routers, or leave the rate out"
            )
    return problems
