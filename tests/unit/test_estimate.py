"""What `villa-ds estimate` says of memory and work, held against tensors that have values."""

import dataclasses

import pytest

from villa_ds import estimate as module_under_test
from villa_ds.cli import main
from villa_ds.config import Recipe, load_recipe
from villa_ds.estimate import GIB, Hardware, LiveBytes, estimate, states_of
from villa_ds.resources import find_recipe
from villa_ds.train.module import build_module
from villa_ds.train.step import StepInput, train_step
from villa_ds.train.torch_engine import TorchEngine

HARDWARE = Hardware(ranks=2, memory=1 * GIB, flops=1e12, utilisation=0.5)
SMALL = (
    "data.root=/nowhere", "model.hidden_size=32", "model.num_hidden_layers=5", "model.num_attention_heads=2",
    "model.intermediate_size=64", "data.tokens=1664", "engine.device=cpu", "engine.precision=float32",
    "phases.0.adversary=null",
)  # fmt: skip


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(find_recipe("demo-vqa"), [*SMALL, *overrides])


def parts(recipe: Recipe) -> tuple:
    data, sizes, _ = module_under_test._data_of(recipe)
    return data, sizes[0]


def test_a_trace_without_values_is_that_of_the_step() -> None:
    """The same peak and the same operations with real tensors, two micro-batches, through the real engine's module."""
    recipe = recipe_of()
    data, sizes = parts(recipe)
    settings = dataclasses.replace(recipe.model, onednn=False, fused_layer_norm=False, num_hidden_layers=2)
    engine = TorchEngine(build_module(settings, data.objectives, data.reference), recipe.engine, recipe.optimizer)
    live = LiveBytes()
    for parameter in engine.module.parameters():
        live.count(parameter)
    work = StepInput(1, 0, data.objectives[0], (sizes.large, sizes.large), (0, 1))
    with live:
        train_step(engine, work)
    gradients = sum(each.grad.nbytes for each in engine.module.parameters() if each.grad is not None)
    weights = sum(each.nbytes for each in engine.module.parameters())
    traced = module_under_test._trace_at(recipe, data, recipe.phases[0], 0, sizes.large, 2)
    assert traced.activations == pytest.approx(live.peak - weights - gradients, rel=0.01)


def test_two_depths_tell_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of()
    data, sizes = parts(recipe)
    continued = module_under_test.trace(recipe, data, recipe.phases[0], 0, sizes.large)
    whole = module_under_test._trace_at(recipe, data, recipe.phases[0], 0, sizes.large, 5)
    assert continued.activations == pytest.approx(whole.activations, rel=0.01)
    assert continued.flops == pytest.approx(whole.flops, rel=1e-9)


def test_an_adversarial_step_is_ten_thirds_of_a_plain_one() -> None:
    plain = recipe_of()
    villa = recipe_of("phases.0.adversary={steps: 3, modality: text}")
    data, sizes = parts(plain)
    work = [module_under_test.trace(each, data, each.phases[0], 0, sizes.large) for each in (plain, villa)]
    assert work[1].flops / work[0].flops == pytest.approx(10 / 3, rel=0.03)
    assert (work[0].passes, work[1].passes) == (1, 3)
    assert work[1].activations > 1.5 * work[0].activations


def test_memory_grows_with_rows() -> None:
    recipe = recipe_of()
    data, sizes = parts(recipe)
    large, small = (
        module_under_test.trace(recipe, data, recipe.phases[0], 0, batch) for batch in (sizes.large, sizes.small)
    )
    growth = module_under_test._growth(sizes, large, small)
    assert growth > 0
    tokens = [len(batch) * batch.joint_length for batch in (sizes.large, sizes.small)]
    assert large.activations - growth * tokens[0] == pytest.approx(small.activations - growth * tokens[1])


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "gradients", "optimizer"),
    [
        ("zero0", "float32", 4, 4, 8),
        ("zero1", "float32", 4, 4, 3),
        ("zero1", "bfloat16", 2, 2, 3),
        ("zero3", "bfloat16", 2, 2.5, 3),  # so few values all stay gathered, and wait in one bucket
        ("zero3_offload", "bfloat16", 1.5, 2, 0),
    ],
)
def test_states_are_zeros_formula(
    stage: str, precision: str, weights: float, gradients: float, optimizer: float
) -> None:
    found = states_of(stage, 1000, 4, recipe_of(f"engine.precision={precision}"), 12)
    assert (found.weights, found.gradients, found.optimizer) == (1000 * weights, 1000 * gradients, 1000 * optimizer)


def test_reducing_once_saves_communication_and_costs_memory() -> None:
    once, every = (
        states_of("zero2", 1000, 4, recipe_of(f"engine.gradient_reduction={value}"), 12)
        for value in ("once", "every_pass")
    )
    assert once.sent == 4000 * 2
    assert every.sent == 4000 * 13
    assert (once.gradients, every.gradients, every.late) == (4000, 1000, 0)


def test_what_reducing_takes_does_not_come_on_top_of_activations() -> None:
    on_gpu, on_cpu = (
        states_of("zero2", 1000, 4, recipe_of(f"engine.device={device}"), 3) for device in ("cuda", "cpu")
    )
    bucket = 4 * module_under_test.BUCKET
    assert (on_gpu.buffers, on_gpu.late) == (bucket, 1000)
    assert (on_cpu.buffers, on_cpu.late) == (0, 1000 + 4000)
    assert on_cpu.peak(5500) - on_cpu.resident == 5500
    assert on_cpu.peak(500) - on_cpu.resident == 5000


def test_the_report_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(estimate(recipe_of(), HARDWARE))
    assert "the shards are not at hand" in lines
    assert " yes " in lines
    assert "<- this recipe's" not in lines  # plain PyTorch, but two ranks are asked for
    poor = dataclasses.replace(HARDWARE, memory=0.01 * GIB)
    assert " NO " in "\n".join(estimate(recipe_of(), poor))
    assert main(["estimate", "demo-vqa", *SMALL, "--gpus", "3"]) == 2
    assert "data.lanes" in capsys.readouterr().err


def test_an_objective_that_needs_its_shards_says_so() -> None:
    recipe = recipe_of("tasks.0.objective=nlvr2")
    with pytest.raises(module_under_test.ConfigError, match=r"data\.root: objective 'nlvr2'"):
        estimate(recipe, HARDWARE)
