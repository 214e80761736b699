"""What `ablation.py` runs: tasks, variants of fine-tuning, and the study of why the adversary pays or does not."""

from dataclasses import dataclass

BASELINE = "uniter"

PLAIN = ("phases.0.adversary=null",)
# In units of one forward pass: an adversarial step with K = 3 costs 10, a plain one 3 (docs/adversary.md).
COMPUTE = 10 / 3


@dataclass(frozen=True)
class Variant:
    """How a task is fine-tuned."""

    name: str
    says: str
    overrides: tuple[str, ...] = ()
    weights: str = "plain"  # of which pre-training
    steps_factor: float = 1.0
    against: str = BASELINE  # the variant that differences are taken from


@dataclass(frozen=True)
class Task:
    """A recipe, and which metric of which task of it counts."""

    name: str
    recipe: str
    folder: str
    result: str
    metric: str
    overrides: tuple[str, ...] = ()
    second_stage: str | None = None  # the recipe of a pre-training between the first and this


def step_sizes(text: float, image: float) -> tuple[str, ...]:
    """Step sizes of the ascent in both modalities; the recipes' are 0.004 and 0.02."""
    return (f"phases.0.adversary.text.step_size={text}", f"phases.0.adversary.image.step_size={image}")


def dropout(probability: float) -> tuple[str, ...]:
    """Dropout in the backbone; the recipes have none."""
    return tuple(f"model.{name}={probability}" for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"))


VARIANTS = (
    Variant("uniter", "plain pre-training, plain fine-tuning", PLAIN),
    Variant("villa-pre", "adversarial pre-training only", PLAIN, weights="villa"),
    Variant("villa-fine", "adversarial fine-tuning only"),
    Variant("villa", "both", weights="villa"),
    Variant("text", "adversarial fine-tuning, text only", ("phases.0.adversary.modality=text",)),
    Variant("image", "adversarial fine-tuning, image only", ("phases.0.adversary.modality=image",)),
    Variant("alternate", "adversarial fine-tuning, text and image in turn", ("phases.0.adversary.modality=alternate",)),
    Variant(
        "freelb", "adversarial fine-tuning without divergence, uniform start",
        (
            "phases.0.adversary.kl_weight=0", "phases.0.adversary.init=uniform",
            "phases.0.adversary.text.init_norm=0.004", "phases.0.adversary.image.init_norm=0.02",
        ),
    ),
    Variant(
        "r3f", "random noise, no ascent, divergence only",
        (
            "phases.0.adversary.steps=1", "phases.0.adversary.init=normal", "phases.0.adversary.task_weight=0",
            "phases.0.adversary.clean_weight=1", "phases.0.adversary.text.init_norm=0.2",
            "phases.0.adversary.image.init_norm=1.0",
        ),
    ),
    Variant("uniter-compute", "plain, as many forward and backward passes as VILLA", PLAIN, steps_factor=COMPUTE),
    Variant(
        "villa-fine-long", "adversarial fine-tuning only, as many steps as `uniter-compute`",
        steps_factor=COMPUTE, against="uniter-compute",
    ),
    Variant(
        "villa-fine-long-5x", "the same with steps five times as large", step_sizes(0.02, 0.1),
        steps_factor=COMPUTE, against="uniter-compute",
    ),
)  # fmt: skip

# The first 300 scenes for longer: a regulariser shows where there is something to overfit.
VQA = Task(
    "vqa", "demo-scenes-vqa", "scenes-vqa", "scenes-vqa/vqa", "score",
    ("data.sets.scenes-vqa=scenes-vqa/few", "phases.0.steps=300"),
)  # fmt: skip
TASKS = (
    VQA,
    Task("ve", "demo-ve", "ve", "ve/ve", "accuracy", ("data.sets.ve=ve/few", "phases.0.steps=300")),
    Task("nlvr2", "demo-nlvr2", "nlvr2", "nlvr2/nlvr2", "accuracy"),
    Task("vcr", "demo-vcr", "vcr", "vcr/vcr", "accuracy", second_stage="demo-vcr-pretrain"),
    Task("re", "demo-re", "re", "re/refexp", "accuracy"),
    Task("retrieval", "demo-retrieval", "retrieval", "retrieval/retrieval", "accuracy"),
)

# Looks at the validation split only. The baselines on `vqa` are the table's own runs `uniter` and `villa-fine`.
STUDY = (
    (
        VQA,
        (
            Variant("steps-5x", "steps of 0.02 and 0.1", step_sizes(0.02, 0.1)),
            Variant("rate-2x", "no adversary, learning rate 1e-3", (*PLAIN, "optimizer.learning_rate=1.0e-3")),
            Variant("rate-4x", "no adversary, learning rate 2e-3", (*PLAIN, "optimizer.learning_rate=2.0e-3")),
            Variant("dropout", "no adversary, dropout 0.1", (*PLAIN, *dropout(0.1))),
            Variant("dropout-shared", "dropout 0.1, the same masks in all passes", dropout(0.1), against="dropout"),
            Variant(
                "dropout-independent", "dropout 0.1, masks of each pass its own",
                (*dropout(0.1), "phases.0.adversary.dropout=independent"), against="dropout",
            ),
            Variant("kl-0", "KL weight 0", ("phases.0.adversary.kl_weight=0",)),
            Variant("kl-0.5", "KL weight 0.5", ("phases.0.adversary.kl_weight=0.5",)),
            Variant("kl-1.5", "KL weight 1.5", ("phases.0.adversary.kl_weight=1.5",)),
            Variant("kl-5", "KL weight 5", ("phases.0.adversary.kl_weight=5",)),
        ),
    ),
    (
        Task("vqa-1200", "demo-scenes-vqa", "scenes-vqa", "scenes-vqa/vqa", "score"),
        (
            Variant("uniter", "no adversary", PLAIN),
            Variant("steps-5x", "steps of 0.02 and 0.1", step_sizes(0.02, 0.1)),
            Variant("steps-25x", "steps of 0.1 and 0.5", step_sizes(0.1, 0.5)),
            Variant("steps-100x", "steps of 0.4 and 2.0", step_sizes(0.4, 2.0)),
        ),
    ),
)  # fmt: skip
