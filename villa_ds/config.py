"""Recipes: frozen dataclasses that check themselves, read from YAML with ``key=value`` overrides.

An unknown key, a value of the wrong type or out of range is a `ConfigError` with the dotted key. Numbers carry their unit
in the field comment; defaults are the release's settings unless the comment says otherwise.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from villa_ds.errors import ConfigError

T = TypeVar("T")


def _require(condition: bool, key: str, value: object, mend: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: {value!r} does not do: {mend}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a backbone. `preset` fills whatever is left at None (see `villa_ds.models.presets`)."""

    backbone: str = "uniter"
    preset: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int | None = None
    type_vocab_size: int | None = None
    hidden_dropout_prob: float | None = None
    attention_probs_dropout_prob: float | None = None
    initializer_range: float = 0.02
    fused_layer_norm: bool = True  # apex's where it is installed and the device is CUDA, torch's otherwise
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how they become micro-batches."""

    root: str = "."  # folder that the set paths are relative to
    sets: Mapping[str, str] = field(default_factory=dict)  # training sets: name -> shard folder
    validation: Mapping[str, str] = field(default_factory=dict)  # the same names -> held-out shard folder
    tokens: int = 10240  # token budget of a micro-batch: rows x longest row, word pieces + regions + 2 a row
    rows_multiple: int = 8  # rows of a micro-batch are a multiple of this, but for a window's last ones
    lanes: int = 4  # M: global micro-batches of an optimizer step; a world size must divide it
    window: int = 8192  # pairs in a read window: the reach of length bucketing, shuffling and negatives
    max_text_length: int = 60  # word pieces; longer texts are left out and counted
    workers: int = 2  # loader processes a rank; 0 loads in the training process
    prefetch: int = 4  # micro-batches loaded ahead, a worker

    def __post_init__(self) -> None:
        for name in ("tokens", "rows_multiple", "lanes", "window", "max_text_length", "prefetch"):
            _require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "give 1 or more")
        _require(self.workers >= 0, "data.workers", self.workers, "give 0 or more")


@dataclass(frozen=True)
class TaskConfig:
    """One entry of the mix: an objective on a data set; `weight` is its share of the optimizer steps."""

    data: str
    objective: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.weight > 0, "tasks.weight", self.weight, "give a positive share, or leave the task out")


@dataclass(frozen=True)
class MaskingConfig:
    """BERT's masking of word pieces."""

    probability: float = 0.15
    mask_share: float = 0.8  # of the selected: [MASK]
    random_share: float = 0.1  # of the selected: a random word piece; the rest stays


@dataclass(frozen=True)
class RegionMaskingConfig:
    """Masking of regions for MRFR, MRC and MRC-KL."""

    probability: float = 0.15


@dataclass(frozen=True)
class ItmConfig:
    """Image-text matching with word-region alignment."""

    negative_probability: float = 0.5  # a pair's image is replaced by another
    ot_weight: float = 0.1  # weight of the optimal-transport term; 0 leaves it out
    ot_beta: float = 0.5
    ot_iterations: int = 50


@dataclass(frozen=True)
class VqaConfig:
    """Visual question answering over a fixed answer list."""

    num_answers: int | None = None  # None: the size of the training set's answer list


@dataclass(frozen=True)
class ObjectivesConfig:
    """Settings of the objectives; only those named under `tasks` are built."""

    mlm: MaskingConfig = MaskingConfig()
    mrm: RegionMaskingConfig = RegionMaskingConfig()
    itm: ItmConfig = ItmConfig()
    vqa: VqaConfig = VqaConfig()


@dataclass(frozen=True)
class ModalityConfig:
    """Perturbation of one modality. Norms are of a row: over all its tokens (or regions) and widths together."""

    step_size: float = 1e-3
    max_norm: float = 0.0  # 0: no bound
    init_norm: float = 0.0  # size of the initial perturbation for init uniform / normal; 0 takes max_norm


@dataclass(frozen=True)
class AdversaryConfig:
    """The adversary (docs/adversary.md). Defaults are the released loop."""

    steps: int = 3  # K perturbed passes, K - 1 updates
    objective: Literal["released", "paper"] = "released"
    modality: Literal["text", "image", "both", "alternate"] = "text"
    init: Literal["zero", "uniform", "normal"] = "zero"
    norm: Literal["l2", "linf"] = "l2"
    text: ModalityConfig = ModalityConfig()
    image: ModalityConfig = ModalityConfig()
    kl_weight: float = 1.5
    task_weight: float = 1.0  # of the task loss on perturbed passes; 0 with kl_weight > 0 is R3F
    clean_weight: float | None = None  # of a separate clean task loss; None: 0 released, 1 paper
    clean: Literal["joint", "detached"] = "joint"  # whether the divergence reaches theta through the clean pass
    dropout: Literal["shared", "independent"] = "shared"  # masks of the passes of one micro-batch
    schedule: Literal["exact", "textbook"] = "exact"  # same gradients; textbook is the reference to compare with
    warmup_steps: int = 0  # optimizer steps over which step size and bounds grow linearly from the phase's start

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "adversary.steps", self.steps, "give 1 or more")
        _require(
            self.modality != "alternate" or self.objective == "released",
            "adversary.modality",
            self.modality,
            "objective paper already perturbs one modality at a time: use modality both",
        )
        for name in ("text", "image"):
            modality: ModalityConfig = getattr(self, name)
            for item in dataclasses.fields(ModalityConfig):
                value = getattr(modality, item.name)
                _require(value >= 0, f"adversary.{name}.{item.name}", value, "give 0 or more")
            _require(
                self.init == "zero" or max(modality.init_norm, modality.max_norm) > 0 or not self.perturbs(name),
                f"adversary.{name}.init_norm",
                modality.init_norm,
                f"init {self.init} needs init_norm or max_norm above 0",
            )

    def perturbs(self, modality: str) -> bool:
        """Whether "text" or "image" is perturbed."""
        return self.modality in (modality, "both", "alternate")


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of optimizer steps under the one schedule of the run; with or without the adversary."""

    name: str
    steps: int
    adversary: AdversaryConfig | None = None

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "phases.steps", self.steps, "give 1 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, groups and schedule (the release's)."""

    name: Literal["release_adamw", "adamw", "fused_adam"] = "release_adamw"
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 5.0  # global gradient norm; 0: no clipping
    schedule: Literal["linear", "constant", "noam", "vqa_steps"] = "linear"
    warmup_steps: int = 0
    head_multiplier: float = 1.0  # learning-rate factor of the downstream head

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "give a positive rate")
        _require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "give 0 (no clipping) or more")


@dataclass(frozen=True)
class EngineConfig:
    """What runs the step: plain PyTorch in one process, or DeepSpeed."""

    name: Literal["torch", "deepspeed"] = "torch"
    ds_config: str | None = None  # a file of ds_configs/, or a path
    device: str | None = None  # None: CUDA if there is one
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 0  # CPU threads; 0 leaves torch's choice


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out losses and metrics, per objective."""

    every: int = 0  # optimizer steps; 0: at the end of the run only
    micro_batches: int = 0  # bound a task; 0: the whole set


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and how much of it is kept."""

    every: int = 1000  # optimizer steps; the end of the run always saves
    keep_last: int = 2

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "give 1 or more")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "give 1 or more")


@dataclass(frozen=True)
class LogConfig:
    """What a run writes beside its checkpoints."""

    every: int = 10  # optimizer steps between lines on the terminal; metrics.jsonl has every step
    sample_ids: bool = False  # write the ids of every step's samples to metrics.jsonl
    tensorboard: bool = True


@dataclass(frozen=True)
class Recipe:
    """One run: everything that decides its numbers, and where it goes."""

    name: str
    output: str | None = None  # run directory; None: runs/<name>
    seed: int = 42
    initialize: str | None = None  # weights to start from: a .safetensors/.pt of the reference, or a BERT folder
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tasks: tuple[TaskConfig, ...] = ()
    objectives: ObjectivesConfig = ObjectivesConfig()
    phases: tuple[PhaseConfig, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        _require(len(self.tasks) > 0, "tasks", list(self.tasks), "name at least one data set and objective")
        _require(len(self.phases) > 0, "phases", list(self.phases), "name at least one phase")
        for position, task in enumerate(self.tasks):
            _require(
                task.data in self.data.sets,
                f"tasks.{position}.data",
                task.data,
                f"data.sets has {sorted(self.data.sets)}",
            )
        for name in self.data.validation:
            _require(name in self.data.sets, f"data.validation.{name}", name, "it needs a training set of that name")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def run_directory(self) -> Path:
        """Where the run writes."""
        return Path(self.output if self.output is not None else f"runs/{self.name}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply ``dotted.key=value`` overrides (values are YAML), check everything."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}") from None
    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values")
    for override in overrides:
        _apply_override(mapping, override)
    return from_mapping(Recipe, mapping, "")


def dump(config: Any) -> str:
    """YAML of a configuration; reads back to an equal one."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, width=120)


def to_mapping(value: Any) -> Any:
    """Plain dicts, lists and scalars of a configuration."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_mapping(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(item) for item in value]
    return value


def from_mapping(cls: type[T], mapping: object, path: str) -> T:
    """Build the dataclass `cls` from a mapping; `path` is the dotted key of the mapping, for messages."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path or 'recipe'}: expected keys and values, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in mapping:
        if key not in known:
            raise ConfigError(f"{_join(path, str(key))}: unknown key; known here: {', '.join(known)}")
    values = {key: _convert(hints[key], value, _join(path, key)) for key, value in mapping.items()}
    try:
        return cls(**values)
    except TypeError:
        missing = [
            item.name
            for item in dataclasses.fields(cls)  # type: ignore[arg-type]
            if item.name not in values
            and item.default is dataclasses.MISSING
            and item.default_factory is dataclasses.MISSING
        ]
        raise ConfigError(f"{_join(path, missing[0])}: missing, give it a value") from None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override has the form dotted.key=value")
    *parents, last = key.split(".")
    node: Any = mapping
    for parent in parents:
        if isinstance(node, list):
            node = _element(node, parent, key)
        else:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{key}: {parent} is a value, not a group of keys")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {text!r} is not YAML") from None
    if isinstance(node, list):
        _element(node, last, key)
        node[int(last)] = value
    else:
        node[last] = value


def _element(node: list[Any], index: str, key: str) -> Any:
    if not index.isdigit() or int(index) >= len(node):
        raise ConfigError(f"{key}: {index!r} is not one of the {len(node)} list elements, counted from 0")
    return node[int(index)]


def _convert(hint: Any, value: object, path: str) -> Any:
    """`value` as the type `hint`, or a ConfigError that names `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(argument for argument in arguments if argument is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{path}.{index}") for index, item in enumerate(value))
        if len(value) != len(arguments):
            raise ConfigError(f"{path}: expected {len(arguments)} values, got {len(value)}")
        return tuple(_convert(argument, item, path) for argument, item in zip(arguments, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected keys and values, got {value!r}")
        return {str(key): _convert(arguments[1], item, _join(path, str(key))) for key, item in value.items()}
    return _convert_scalar(hint, value, path)


def _convert_scalar(hint: type, value: object, path: str) -> object:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                pass
    if hint is str and isinstance(value, str):
        return value
    raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r}")
