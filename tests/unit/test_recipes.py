"""Every shipped recipe loads, holds the releases' numbers, and takes the first optimizer step of each of its phases."""

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.downstream import LAYOUTS, make_task_shards
from tests.shards import make_shards
from villa_ds.config import AdversaryConfig, ModalityConfig, ModelConfig, Recipe, load_recipe
from villa_ds.data.lanes import draw_task
from villa_ds.models.layers import initialize
from villa_ds.models.presets import resolve_sizes
from villa_ds.models.uniter import TextEmbeddings
from villa_ds.resources import find_recipe
from villa_ds.train.engine import read_ds_config
from villa_ds.train.loop import train

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in PATHS]
LANES = 2
SCENES = (
    "demo-scenes-pretrain", "demo-vcr-pretrain",
    *(f"demo-{task}" for task in ("scenes-vqa", "ve", "nlvr2", "vcr", "re", "retrieval")),
)  # fmt: skip
# The same recipe at a width and on batches that a laptop steps through in a moment.
SMALL = (
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.intermediate_size=16",
    "data.tokens=256", f"data.lanes={LANES}", "data.window=64", "data.workers=0", "initialize=null",
    "optimizer.warmup_steps=0", "engine.name=torch", "engine.precision=float32", "engine.device=cpu",
    "validation.every=0", "log.tensorboard=false", "data.rows_multiple=1", "objectives.vcr.new_words=0",
    "objectives.retrieval.candidates=3", "objectives.retrieval.hard_negatives=1",
)  # fmt: skip


@pytest.fixture(params=PATHS, ids=NAMES)
def path(request: pytest.FixtureRequest) -> Path:
    shipped: Path = request.param
    return shipped


def test_loads_and_is_documented(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.run_directory == Path("runs") / path.stem
    resolve_sizes(recipe.model, vocabulary_size=28996, feature_width=2048)
    if recipe.engine.ds_config is not None:
        read_ds_config(recipe.engine.ds_config)
    assert f"`{path.stem}`" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


# Of each fine-tuning task one recipe with the adversary: what the others change is numbers, which are checked above.
STEPPED = [
    path for path in PATHS
    if ("extends:" not in path.read_text(encoding="utf-8") and "-uniter-" not in path.stem.removeprefix("vqa-"))
    or path.stem.endswith("-villa-base")
]  # fmt: skip


LONGER = {path.stem for path in STEPPED if not path.stem.startswith(("demo-", "uniter-", "villa-", "vqa-"))}


def small_shards(root: Path, recipe: Recipe) -> None:
    """Stand-ins for a recipe's sets, in the layout that their last objective reads."""
    layouts = {task.data: task.objective.removesuffix("-hard") for task in recipe.tasks}
    sets = [*recipe.data.sets.items(), *recipe.data.validation.items()]
    for number, (name, folder) in enumerate(sets):
        layout = "vcr" if recipe.objectives.text == "vcr" else layouts[name]
        if layout in LAYOUTS and layout != "vqa":
            make_task_shards(root / folder, layout, groups=8, shards=1, seed=number)
        else:
            make_shards(root / folder, groups=8, shards=1, seed=number)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LONGER else ()) for path in STEPPED],
)
def test_first_step_of_each_phase(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    small = [*SMALL, f"data.root={tmp_path}/shards", f"output={tmp_path}/run"]
    if path.stem in SCENES:  # their sets are there, so their targets are tested too
        small += [f"data.root={request.getfixturevalue('small_benchmark')}", "data.tokens=4096"]
    small += ["data.tokens=800"] * (path.stem in LONGER)
    small += [f"phases.{position}.steps=1" for position in range(len(load_recipe(path).phases))]
    recipe = load_recipe(path, small)
    if path.stem not in SCENES:
        small_shards(tmp_path / "shards", recipe)

    results = train(recipe)

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(recipe.phases) + 1))
    for row, phase in zip(rows, recipe.phases, strict=True):
        task = recipe.tasks[draw_task(recipe.seed, row["step"], [task.weight for task in recipe.tasks])]
        assert (row["phase"], row["data"], row["objective"]) == (phase.name, task.data, task.objective)
        assert row["passes"] == LANES * passes_of(phase.adversary)
        assert math.isfinite(row["grad_norm"])
        assert row["grad_norm"] > 0
        assert set(row["losses"]) >= {"loss"} | ({"perturbed_loss", "kl"} if phase.adversary else set())
        assert all(math.isfinite(loss) for loss in row["losses"].values()), row["losses"]
        if phase.adversary is not None:
            assert perturbations_of(row["losses"]) == set(modalities_of(phase.adversary))
    held_out = {f"{task.data}/{task.objective}" for task in recipe.tasks if task.data in recipe.data.validation}
    assert set(results) == held_out


def passes_of(adversary: AdversaryConfig | None) -> int:
    """Backward passes of a micro-batch of an adversary that starts at zero and perturbs in one forward at a time.

    K where the clean pass is ascent step 0; where it has dropout masks of its own, one more.
    """
    if adversary is None:
        return 1
    assert (adversary.init, adversary.objective, adversary.schedule) == ("zero", "released", "exact")
    assert adversary.modality != "alternate"
    return adversary.steps + (adversary.dropout == "independent")


def modalities_of(adversary: AdversaryConfig) -> list[str]:
    return [name for name in ("text", "image") if adversary.perturbs(name)]


def perturbations_of(losses: dict[str, float]) -> set[str]:
    """Modalities whose perturbation, as it was added, is not zero."""
    found = {name for name, value in losses.items() if name.endswith("_perturbation_norm") and value > 0}
    return {{"text_perturbation_norm": "text", "regions_perturbation_norm": "image"}[name] for name in found}


@dataclass(frozen=True)
class Released:
    """Numbers of a released configuration file, and of the command that its README gives (`gpus`)."""

    size: str
    gpus: int
    accumulation: int
    tokens: int
    steps: int
    warmup: int
    learning_rate: float
    clip: float  # of the gradient summed over accumulated micro-batches
    validate: int
    head_multiplier: float = 1.0


# ChenRocks/UNITER config/: pretrain-alldata-*, train-vqa-*; zhegan27/VILLA's train-vqa-*-adv agree on these.
PRETRAIN = {
    "base": Released("base", 8, 6, 10240, 200_000, 10_000, 5e-5, 5.0, 5_000),
    "large": Released("large", 16, 4, 6144, 500_000, 10_000, 5e-5, 5.0, 10_000),
}
VQA = {
    "base": Released("base", 4, 5, 5120, 6_000, 600, 8e-5, 2.0, 500, 10.0),
    "large": Released("large", 8, 4, 3072, 5_000, 500, 5e-5, 2.0, 500, 10.0),
}
DERIVED = {
    f"{prefix}{model}-{size}": released
    for prefix, sizes in (("", PRETRAIN), ("vqa-", VQA), ("gqa-", VQA))
    for size, released in sizes.items()
    for model in ("uniter", "villa")
}


@dataclass(frozen=True)
class Tuned:
    """Numbers of a released fine-tuning configuration; `summed`: how many of our losses its gradient adds up."""

    lanes: int
    tokens: int
    steps: int
    warmup: int
    learning_rate: float
    summed: int
    validate: int
    seed: int = 42
    clip: float = 2.0
    adversary: tuple[str, float, float] | None = None  # modality, step size, weight of the divergence


TEXT_BASE, TEXT_LARGE = ("text", 1e-3, 1.5), ("text", 2e-3, 1.0)
TUNED = {
    "ve-uniter-base": Tuned(8, 4096, 4000, 400, 8e-5, 4, 500),
    "ve-uniter-large": Tuned(8, 4096, 4000, 400, 3e-5, 2, 500),
    "ve-villa-base": Tuned(8, 4096, 4000, 400, 8e-5, 4, 500, adversary=TEXT_BASE),
    "ve-villa-large": Tuned(8, 4096, 4000, 400, 3e-5, 2, 500, adversary=TEXT_BASE),
    "nlvr2-uniter-base": Tuned(1, 10240, 8000, 800, 3e-5, 1, 500, 77),
    "nlvr2-uniter-large": Tuned(4, 5120, 5000, 500, 2e-5, 2, 500, 24),
    "nlvr2-villa-base": Tuned(1, 10240, 8000, 800, 3e-5, 1, 500, 77, adversary=TEXT_BASE),
    "nlvr2-villa-large": Tuned(4, 5120, 5000, 500, 2e-5, 2, 500, 24, adversary=TEXT_BASE),
    "vcr-pretrain-uniter-base": Tuned(16, 6144, 45000, 4500, 3e-5, 4, 2000, clip=0.0),
    "vcr-pretrain-uniter-large": Tuned(16, 6144, 45000, 4500, 3e-5, 4, 2000, clip=0.0),
    "vcr-uniter-base": Tuned(20, 4 * 4000, 8000, 800, 6e-5, 5, 1000),
    "vcr-uniter-large": Tuned(20, 4 * 4000, 8000, 800, 6e-5, 5, 1000),
    "vcr-villa-base": Tuned(20, 4 * 4000, 8000, 800, 6e-5, 5, 1000, adversary=("both", 1e-2, 1.5)),
    "vcr-villa-large": Tuned(40, 4 * 2000, 10000, 1000, 6e-5, 10, 1000, 88, adversary=("both", 1e-1, 1.0)),
}
SECOND_STAGES = ("vcr-pretrain-villa-base", "vcr-pretrain-villa-large")
for key, rate, steps, warmup in (
    ("refcoco", 1e-4, 24000, 1500), ("refcoco-plus", 6e-5, 10000, 1000), ("refcocog", 1e-4, 24000, 1500),
):  # fmt: skip
    for size, own in (("base", TEXT_BASE), ("large", TEXT_LARGE)):
        TUNED[f"{key}-uniter-{size}"] = Tuned(1, 4096, steps, warmup, rate, 128, 1000, 24)
        TUNED[f"{key}-villa-{size}"] = Tuned(1, 4096, steps, warmup, rate, 128, 1000, 24, adversary=own)
for key, large_rate in (("coco", 3e-5), ("flickr", 5e-5)):
    for size, rate, own in (("base", 5e-5, TEXT_BASE), ("large", large_rate, TEXT_LARGE)):
        TUNED[f"retrieval-{key}-uniter-{size}"] = Tuned(128, 131072, 5000, 500, rate, 2, 500)
        TUNED[f"retrieval-{key}-villa-{size}"] = Tuned(128, 131072, 5000, 500, rate, 2, 500, adversary=own)


@pytest.mark.parametrize("name", sorted(TUNED))
def test_fine_tuning_numbers(name: str) -> None:
    recipe, tuned = load_recipe(ROOT / "launch" / "recipes" / f"{name}.yaml"), TUNED[name]
    assert recipe.model.preset == f"uniter-{name.rpartition('-')[2]}"
    assert recipe.initialize is not None
    assert (recipe.data.lanes, recipe.data.tokens, recipe.seed) == (tuned.lanes, tuned.tokens, tuned.seed)
    assert (recipe.total_steps, recipe.optimizer.warmup_steps) == (tuned.steps, tuned.warmup)
    assert recipe.validation.every == recipe.checkpoints.every == tuned.validate
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.head_multiplier) == (tuned.learning_rate, 1.0)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.schedule) == ((0.9, 0.98), 0.01, "linear")
    assert optimizer.eps * tuned.summed == pytest.approx(1e-6, rel=1e-6)
    assert optimizer.clip_norm * tuned.summed == pytest.approx(tuned.clip, rel=1e-6)
    (phase,) = recipe.phases
    if tuned.adversary is None:
        assert phase.adversary is None
    else:
        modality, step, weight = tuned.adversary
        image = ModalityConfig(step_size=step) if modality == "both" else ModalityConfig()
        assert phase.adversary == AdversaryConfig(
            steps=3, modality=modality, text=ModalityConfig(step_size=step), image=image, kl_weight=weight,  # type: ignore[arg-type]
            dropout="independent",
        )  # fmt: skip


def test_every_recipe_has_its_numbers_checked() -> None:
    assert set(NAMES) - set(DERIVED) - set(TUNED) - set(SECOND_STAGES) == {
        name for name in NAMES if name.startswith("demo-")
    }


@pytest.mark.parametrize("name", sorted(DERIVED))
def test_numbers_are_the_releases_converted_to_a_mean(name: str) -> None:
    """The release sums A micro-batches and averages ranks, so its gradient is A times the mean over lanes."""
    recipe, released = load_recipe(ROOT / "launch" / "recipes" / f"{name}.yaml"), DERIVED[name]
    assert recipe.model.preset == f"uniter-{released.size}"
    assert recipe.data.lanes == released.gpus * released.accumulation
    assert recipe.data.tokens == released.tokens
    assert (recipe.data.rows_multiple, recipe.data.window, recipe.data.max_text_length) == (8, 8192, 60)
    assert recipe.total_steps == released.steps
    assert recipe.validation.every == released.validate
    assert recipe.seed == 42
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.schedule) == ("release_adamw", "linear")
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.98), 0.01)
    assert optimizer.warmup_steps == released.warmup
    assert optimizer.learning_rate == released.learning_rate
    assert optimizer.head_multiplier == released.head_multiplier
    # AdamW's update is the same for g, clip, eps and for g / A, clip / A, eps / A.
    assert optimizer.clip_norm * released.accumulation == pytest.approx(released.clip, rel=1e-6)
    assert optimizer.eps * released.accumulation == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in sorted(DERIVED) if "qa-" not in name])
def test_pretraining_mix(name: str) -> None:
    recipe = load_recipe(ROOT / "launch" / "recipes" / f"{name}.yaml")
    small, large = (6, 8, 4, 4), (9, 12, 6, 6)  # itm, mlm, mrfr, mrckl
    mix = {(task.data, task.objective): task.weight for task in recipe.tasks}
    expected = {"coco": small, "vg": large, "cc": large, "sbu": small}
    assert mix == {
        (data, objective): weight
        for data, weights in expected.items()
        for objective, weight in zip(("itm", "mlm", "mrfr", "mrckl"), weights, strict=True)
    }
    assert len(recipe.tasks) == len(mix)
    objectives = recipe.objectives
    assert (objectives.mlm.probability, objectives.mrm.probability) == (0.15, 0.15)
    assert (objectives.itm.negative_probability, objectives.itm.ot_weight) == (0.5, 0.1)


def adversary_of(recipe: Recipe) -> AdversaryConfig:
    assert all(phase.adversary is None for phase in recipe.phases[:-1])
    adversary = recipe.phases[-1].adversary
    assert adversary is not None
    return adversary


@pytest.mark.parametrize(("size", "step_size", "kl_weight"), [("base", 1e-3, 1.5), ("large", 2e-3, 1.0)])
def test_vqa_adversary_is_the_released_loop(size: str, step_size: float, kl_weight: float) -> None:
    recipe = load_recipe(ROOT / "launch" / "recipes" / f"vqa-villa-{size}.yaml")
    assert adversary_of(recipe) == AdversaryConfig(
        steps=3, objective="released", modality="text", init="zero", norm="l2",
        text=ModalityConfig(step_size=step_size), kl_weight=kl_weight, dropout="independent",
    )  # fmt: skip
    assert [task.objective for task in recipe.tasks] == ["vqa", "vqa"]
    assert recipe.objectives.vqa.num_answers == 3129


SAME = ("seed", "model", "data", "tasks", "objectives", "optimizer", "engine", "validation")


@pytest.mark.parametrize(("size", "adversarial"), [("base", 100_000), ("large", 75_000)])
def test_villa_is_uniter_with_a_last_adversarial_phase(size: str, adversarial: int) -> None:
    folder = ROOT / "launch" / "recipes"
    villa, uniter = load_recipe(folder / f"villa-{size}.yaml"), load_recipe(folder / f"uniter-{size}.yaml")
    assert [phase.steps for phase in villa.phases] == [uniter.total_steps - adversarial, adversarial]
    adversary_of(villa)
    same = (*SAME, "initialize")
    assert {key: getattr(villa, key) for key in same} == {key: getattr(uniter, key) for key in same}


@pytest.mark.parametrize("name", SECOND_STAGES)
def test_villas_second_stage_is_uniters_with_the_adversary_and_share_of_the_first(name: str) -> None:
    folder, size = ROOT / "launch" / "recipes", name.rpartition("-")[2]
    villa, uniter = load_recipe(folder / f"{name}.yaml"), load_recipe(folder / f"vcr-pretrain-uniter-{size}.yaml")
    first = load_recipe(folder / f"villa-{size}.yaml")
    assert {key: getattr(villa, key) for key in SAME} == {key: getattr(uniter, key) for key in SAME}
    assert villa.initialize == f"pretrained/villa-{size}.pt"
    assert adversary_of(villa) == adversary_of(first)
    assert villa.total_steps == uniter.total_steps == 45_000
    assert villa.phases[1].steps / villa.total_steps == first.phases[1].steps / first.total_steps


@pytest.mark.parametrize(
    ("step_size", "dtype", "cosine", "ratio"),
    [
        (1e-3, torch.bfloat16, 0.27, 3.7),
        (1e-3, torch.float16, 0.71, 1.4),
        (2e-3, torch.bfloat16, 0.38, 2.7),
        (2e-3, torch.float16, 0.87, 1.1),
        (1e-2, torch.bfloat16, 0.77, 1.3),
        (1e-2, torch.float16, 0.99, 1.0),
    ],
)
def test_what_rounding_leaves_of_a_perturbation(
    step_size: float, dtype: torch.dtype, cosine: float, ratio: float
) -> None:
    """The table in docs/recipes.md: the change of UNITER-base's text embedding, rounded, against the exact one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embeddings = TextEmbeddings(resolve_sizes(ModelConfig(preset="uniter-base"), 1000, 2048)).eval()
        initialize(embeddings, 0.02)
        pieces = torch.randint(5, 1000, (64, 16))
        direction = torch.randn(64, 16, embeddings.word_embeddings.embedding_dim)
    words, types = embeddings.word_embeddings(pieces), embeddings.token_type_embeddings(torch.zeros_like(pieces))
    perturbation = step_size * direction / direction.flatten(1).norm(dim=1)[:, None, None]
    with torch.no_grad():
        clean, perturbed = embeddings(words, types), embeddings(words + perturbation, types)
    exact = (perturbed - clean).flatten(1)
    rounded = (perturbed.to(dtype).float() - clean.to(dtype).float()).flatten(1)
    assert torch.cosine_similarity(rounded, exact).mean().item() == pytest.approx(cosine, abs=0.02)
    assert (rounded.norm() / exact.norm()).item() == pytest.approx(ratio, rel=0.05)


def test_documented_commands_and_the_least_recipe_load(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    villa-ds train (.*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        name, *overrides = shlex.split(command, comments=True)
        load_recipe(find_recipe(name), overrides)
    least = tmp_path / "mine.yaml"
    least.write_text(text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert load_recipe(least).total_steps == 1000
