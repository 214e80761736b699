"""Recipes: frozen dataclasses that check themselves, read from YAML with ``key=value`` overrides.

An unknown key, a value of the wrong type or out of range is a `ConfigError` with the dotted key. Numbers carry their
unit in the field comment; defaults are the release's settings unless the comment says otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.mapping import from_mapping, read_yaml, require, to_mapping


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
    onednn: bool = True  # large float32 products on CPUs by oneDNN instead of MKL
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how they become micro-batches."""

    root: str = "."  # folder, URL prefix or pipe: command that the set paths are relative to (docs/remote.md)
    sets: Mapping[str, str] = field(default_factory=dict)  # training sets: name -> shard folder
    validation: Mapping[str, str] = field(default_factory=dict)  # the same names -> held-out shard folder
    tokens: int = 10240  # token budget of a micro-batch: rows x longest row, word pieces + regions + 2 a row
    rows_multiple: int = 8  # rows of a micro-batch are a multiple of this, but for a window's last ones
    lanes: int = 4  # M: global micro-batches of an optimizer step; a world size must divide it
    window: int = 8192  # pairs in a read window: the reach of length bucketing, shuffling and negatives
    max_text_length: int = 60  # word pieces; longer texts are left out and counted
    workers: int = 2  # loader processes a rank; 0 loads in the training process
    prefetch: int = 4  # micro-batches loaded ahead, a worker
    mix_extractors: bool = False  # take sets of different extractors, whose features mean different things
    damage_budget: float = 0.001  # share of a training set's pairs that may be damaged; validation sets may have none
    verify: Literal["off", "shards"] = "off"  # whether a local file's checksum is computed when it is first opened
    cache: str | None = None  # folder for copies of remote shards; None: $VILLA_DS_CACHE, or the user's cache folder
    cache_gib: float = 100.0  # what it may hold, of all runs together; more only where all of it is in use
    fetch_ahead: int = 2  # remote shards fetched before they are needed, a rank and data set; 0: none
    retries: int = 5  # further attempts at a remote file, each after a longer wait, that bring it no further
    timeout_s: float = 60.0  # for a connection to a remote store, and for its next bytes

    def __post_init__(self) -> None:
        for name in ("tokens", "rows_multiple", "lanes", "window", "max_text_length", "prefetch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        require(0 <= self.damage_budget < 1, "damage_budget", self.damage_budget, "give a share from 0 to below 1")
        for name in ("workers", "fetch_ahead", "retries"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("cache_gib", "timeout_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "give more than 0")


@dataclass(frozen=True)
class TaskConfig:
    """One entry of the mix: an objective on a data set; `weight` is its share of the optimizer steps."""

    data: str
    objective: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "give a positive share, or leave the task out")


@dataclass(frozen=True)
class ModalityConfig:
    """Perturbation of one modality. Norms are of a row: over all its tokens (or regions) and widths together."""

    step_size: float = 1e-3
    max_norm: float = 0.0  # 0: no bound
    init_norm: float = 0.0  # size of the initial perturbation for init uniform / normal; 0 takes max_norm

    def __post_init__(self) -> None:
        for name in ("step_size", "max_norm", "init_norm"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")


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
    clean_graph: Literal["keep", "recompute"] = "keep"  # recompute: a forward pass more, a pass's activations less
    warmup_steps: int = 0  # optimizer steps over which step size and bounds grow linearly from the phase's start

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "give 1 or more")
        for name in ("kl_weight", "task_weight", "clean_weight", "warmup_steps"):
            require((getattr(self, name) or 0) >= 0, name, getattr(self, name), "give 0 or more")
        require(
            self.kl_weight + self.task_weight > 0,
            "kl_weight",
            self.kl_weight,
            "with task_weight 0 perturbed passes count for nothing: raise one of the two, or set adversary to null",
        )
        require(
            self.modality != "alternate" or self.objective == "released",
            "modality",
            self.modality,
            "objective paper already perturbs one modality at a time: use modality both",
        )
        require(
            self.schedule == "exact" or self.clean_graph == "keep",
            "clean_graph",
            self.clean_graph,
            "schedule textbook differentiates the clean graph in every step: use keep",
        )
        for name in ("text", "image"):
            modality: ModalityConfig = getattr(self, name)
            require(
                self.init == "zero" or max(modality.init_norm, modality.max_norm) > 0 or not self.perturbs(name),
                f"{name}.init_norm",
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
        require(self.steps >= 1, "steps", self.steps, "give 1 or more")


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
    warmup_steps: int = 0  # vqa_steps: the length of each of its three stairs
    decay_start: int = 20000  # vqa_steps: the last optimizer step at the full rate
    decay_interval: int = 2000  # vqa_steps: optimizer steps from one decay to the next
    decay_rate: float = 0.2  # vqa_steps: factor of each decay
    head_multiplier: float = 1.0  # learning-rate factor of the downstream head

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "give a positive rate")
        require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "give 0 (no clipping) or more")
        for beta in self.betas:
            require(0 <= beta < 1, "betas", list(self.betas), "give two numbers in [0, 1)")
        for name in ("eps", "weight_decay", "warmup_steps", "decay_start", "decay_rate", "head_multiplier"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        require(
            self.schedule != "noam" or self.warmup_steps >= 1,
            "warmup_steps",
            self.warmup_steps,
            "schedule noam needs 1 or more: without warm-up its rate is 0 for ever",
        )
        require(self.decay_interval >= 1, "decay_interval", self.decay_interval, "give 1 or more")


@dataclass(frozen=True)
class EngineConfig:
    """What runs the step: plain PyTorch in one process, or DeepSpeed."""

    name: Literal["torch", "deepspeed"] = "torch"
    ds_config: str | None = None  # a file of ds_configs/, or a path
    device: str | None = None  # None: CUDA if there is one
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_reduction: Literal["auto", "once", "every_pass"] = "auto"  # ZeRO 2 and 3; auto: once at 2, every_pass at 3
    compile: bool = False  # torch.compile of the transformer layers (docs/performance.md)
    threads: int = 0  # CPU threads; 0 leaves torch's choice

    def __post_init__(self) -> None:
        require(self.ds_config != "", "ds_config", self.ds_config, "give a file of ds_configs/ or a path, or null")
        require(self.device != "", "device", self.device, "give cpu or cuda, or null for the better one there is")
        require(0 <= self.threads <= 1024, "threads", self.threads, "give 0 (torch's choice) to 1024")


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out losses and metrics, per objective."""

    every: int = 0  # optimizer steps; 0: at the end of the run only
    micro_batches: int = 0  # bound a task; 0: the whole set
    gallery: int = 0  # retrieval: recall among so many images, the first of the set, with their texts; 0: none

    def __post_init__(self) -> None:
        require(self.every >= 0, "every", self.every, "give 0 or more")
        require(self.micro_batches >= 0, "micro_batches", self.micro_batches, "give 0 or more")
        require(self.gallery >= 0, "gallery", self.gallery, "give 0 or more; more than there are images takes all")


@dataclass(frozen=True)
class CheckpointsConfig:
    """When the state is saved and how much of it is kept."""

    every: int = 1000  # optimizer steps; the end of the run and a request to stop always save
    minutes: float = 0.0  # save also when this much time has passed since the last; 0: by steps only
    keep_last: int = 2
    keep_every: int = 0  # keep those whose step is a multiple of this for good; 0: none
    asynchronous: bool = False  # write in the background while training goes on
    on_error: Literal["stop", "continue"] = (
        "stop"  # when one cannot be written (disk full): the older ones stay either way
    )

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", self.every, "give 1 or more")
        require(self.keep_last >= 1, "keep_last", self.keep_last, "give 1 or more")
        require(self.keep_every >= 0, "keep_every", self.keep_every, "give 0 (none) or more")
        require(self.minutes >= 0, "minutes", self.minutes, "give 0 (by steps only) or more")


@dataclass(frozen=True)
class StabilityConfig:
    """What follows when a step's loss is not finite or jumps (docs/reliability.md)."""

    nonfinite: Literal["stop", "skip", "roll_back"] = "stop"  # a loss or gradient that is not finite
    spike: Literal["stop", "skip", "roll_back"] = "roll_back"  # a loss above spike_factor x the usual
    spike_factor: float = 0.0  # 0: jumps are not looked for
    spike_window: int = 50  # steps of the same objective whose median is the usual loss
    max_events: int = 10  # steps skipped or rolled back before the run stops

    def __post_init__(self) -> None:
        require(self.spike_factor == 0 or self.spike_factor > 1, "spike_factor", self.spike_factor, "give 0 or above 1")
        require(self.spike_window >= 1, "spike_window", self.spike_window, "give 1 or more")
        require(self.max_events >= 0, "max_events", self.max_events, "give 0 or more")

    @property
    def rolls_back(self) -> bool:
        """Whether a checkpoint may be gone back to."""
        return self.nonfinite == "roll_back" or (self.spike_factor > 0 and self.spike == "roll_back")


@dataclass(frozen=True)
class WatchConfig:
    """How ranks that die or hang are noticed (docs/reliability.md)."""

    timeout_s: float = 600.0  # longer than any step, save or micro-batch of a validation takes; 0: nobody watches

    def __post_init__(self) -> None:
        mend = "give seconds, at most 10,000,000, or 0 to watch nothing"
        require(0 <= self.timeout_s <= 1e7, "timeout_s", self.timeout_s, mend)


@dataclass(frozen=True)
class LogConfig:
    """What a run writes beside its checkpoints."""

    every: int = 10  # optimizer steps between lines on the terminal; metrics.jsonl has every step
    tensorboard: bool = True

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", self.every, "give 1 or more")


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
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    phases: tuple[PhaseConfig, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    stability: StabilityConfig = StabilityConfig()
    watch: WatchConfig = WatchConfig()
    log: LogConfig = LogConfig()
    log_sample_ids: bool = False  # write the ids of every step's samples to metrics.jsonl

    def __post_init__(self) -> None:
        require(
            self.output is not None or Path(self.name).name not in ("", ".."),
            "name",
            self.name,
            "it names the run directory, runs/<name>: give a word, or an `output`",
        )
        require(self.output != "", "output", self.output, "give the folder of the run, or null for runs/<name>")
        require(self.initialize != "", "initialize", self.initialize, "give weights, or null")
        require(len(self.tasks) > 0, "tasks", list(self.tasks), "name at least one data set and objective")
        require(len(self.phases) > 0, "phases", list(self.phases), "name at least one phase")
        for position, task in enumerate(self.tasks):
            require(
                task.data in self.data.sets,
                f"tasks.{position}.data",
                task.data,
                f"data.sets has {sorted(self.data.sets)}",
            )
            pairs = [(other.data, other.objective) for other in self.tasks]
            first = pairs.index((task.data, task.objective))
            require(
                first == position,
                f"tasks.{position}",
                f"{task.objective} on {task.data}",
                f"tasks.{first} is the same, give that one the weight of both",
            )
        require(
            self.optimizer.schedule != "linear" or self.optimizer.warmup_steps < self.total_steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"the run has {self.total_steps} steps, give less",
        )
        for name in self.data.validation:
            require(name in self.data.sets, f"data.validation.{name}", name, "it needs a training set of that name")

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
    return from_mapping(Recipe, read_yaml(path, overrides), "")


def dump(config: Any) -> str:
    """YAML of a configuration; reads back to an equal one."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, width=120)
