"""The adversary: the cheap schedule equals the textbook's gradients, at the pass counts that the design promises."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.passes import ModulePasses
from tests.tiny import tiny_batch, tiny_module
from villa_ds.batch import Batch, Perturbation
from villa_ds.config import AdversaryConfig, ModalityConfig
from villa_ds.errors import ConfigError
from villa_ds.train.adversary import Adversary, PassRecord, ascend, initial_delta, project, row_norm
from villa_ds.train.module import TrainModule

STRONG = {"text": ModalityConfig(0.7, 0.9, 0.5), "image": ModalityConfig(0.5, 1.1, 0.5)}


def run(
    config: AdversaryConfig, module: TrainModule, name: str, *, keeps: bool = True
) -> tuple[dict[str, Tensor], ModulePasses, list[PassRecord]]:
    module.zero_grad(set_to_none=True)
    objective = module.objectives[name]
    batch = tiny_batch(objective)
    passes = ModulePasses(module, batch, name, keeps_clean_graph=keeps)
    records: list[PassRecord] = []
    widths = (module.backbone.hidden_size, module.backbone.feature_width)
    Adversary(config).accumulate(passes, batch, objective.divergence, widths, seed=7, observe=records.append)
    gradients = {key: value.grad for key, value in module.named_parameters() if value.grad is not None}
    return gradients, passes, records


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        torch.testing.assert_close(
            gradient, right[name], rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", ["mlm", "itm", "mrfr", "mrckl", "vqa"])
@pytest.mark.parametrize("modality", ["text", "image", "both", "alternate"])
@pytest.mark.parametrize("objective", ["released", "paper"])
@pytest.mark.parametrize("init", ["zero", "uniform"])
@pytest.mark.parametrize("clean", ["joint", "detached"])
def test_exact_equals_textbook(name: str, modality: str, objective: str, init: str, clean: str) -> None:
    if objective == "paper" and modality == "alternate":
        with pytest.raises(ConfigError, match="modality both"):
            AdversaryConfig(objective="paper", modality="alternate")
        return
    module = tiny_module(name)
    exact = AdversaryConfig(
        steps=3, objective=objective, modality=modality, init=init, clean=clean, kl_weight=1.3, **STRONG
    )  # fmt: skip
    expected, _, textbook_records = run(dataclasses.replace(exact, schedule="textbook"), module, name)
    recompute = dataclasses.replace(exact, clean_graph="recompute")
    for config, keeps in ((exact, True), (exact, False), (recompute, True)):
        gradients, _, records = run(config, module, name, keeps=keeps)
        assert_same(gradients, expected)
        assert len(records) == len(textbook_records)
        for mine, theirs in zip(records, textbook_records, strict=True):
            assert mine.step == theirs.step
            torch.testing.assert_close(mine.deltas, theirs.deltas, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(mine.divergence, theirs.divergence, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "forwards", "backwards"),
    [
        ({"modality": "text"}, 3, 3),
        ({"modality": "both"}, 3, 3),
        ({"modality": "both", "clean": "detached"}, 3, 3),
        ({"modality": "both", "clean_graph": "recompute"}, 4, 3),
        ({"modality": "both", "clean_graph": "recompute", "clean": "detached"}, 3, 3),
        ({"modality": "both", "init": "uniform", "clean_graph": "recompute"}, 5, 4),
        ({"modality": "alternate"}, 5, 5),
        ({"modality": "alternate", "clean": "detached"}, 5, 5),
        ({"modality": "both", "objective": "paper", "init": "uniform"}, 7, 7),
        ({"modality": "text", "init": "uniform", "kl_weight": 0.0}, 3, 3),  # FreeLB: no clean pass
        ({"modality": "text", "steps": 1}, 1, 1),  # plain training
    ],
)
def test_passes_are_as_few_as_promised(settings: dict, forwards: int, backwards: int) -> None:
    config = AdversaryConfig(**{"steps": 3, **STRONG, **settings})
    _, passes, _ = run(config, tiny_module("vqa"), "vqa")
    assert (passes.forwards, passes.backwards, passes.finals) == (forwards, backwards, 1)


class Saved:
    """A tensor that a graph saved for its backward, counted while it lives."""

    alive = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Saved.alive += tensor.numel()
        Saved.most = max(Saved.most, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= self.tensor.numel()


@pytest.mark.parametrize("init", ["zero", "uniform"])
def test_recomputing_holds_one_graph_at_a_time(init: str) -> None:
    module, most = tiny_module("vqa"), {}
    for setting in ("keep", "recompute"):
        config = AdversaryConfig(modality="both", init=init, clean_graph=setting, **STRONG)
        Saved.alive = Saved.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            run(config, module, "vqa")
        most[setting] = Saved.most
    assert most["recompute"] < 0.6 * most["keep"]


def test_the_textbook_schedule_keeps_its_clean_graph() -> None:
    with pytest.raises(ConfigError, match=r"clean_graph: 'recompute'.*textbook"):
        AdversaryConfig(schedule="textbook", clean_graph="recompute")


def test_one_step_is_plain_training() -> None:
    module = tiny_module("mlm")
    gradients, _, _ = run(AdversaryConfig(steps=1, modality="both", **STRONG), module, "mlm")
    module.zero_grad(set_to_none=True)
    module(tiny_batch(module.objectives["mlm"]), "mlm").loss.backward()
    assert_same(gradients, {key: value.grad for key, value in module.named_parameters() if value.grad is not None})


def test_r3f_is_a_setting() -> None:
    """Noise, no ascent, and the divergence alone on the perturbed pass: loss = L(clean) + weight x KL."""
    module = tiny_module("vqa")
    config = AdversaryConfig(steps=1, init="normal", task_weight=0.0, clean_weight=1.0, kl_weight=0.7, **STRONG)
    gradients, _, (record,) = run(config, module, "vqa")
    module.zero_grad(set_to_none=True)
    batch = tiny_batch(module.objectives["vqa"])
    clean = module(batch, "vqa")
    noisy = module(batch, "vqa", Perturbation(text=record.deltas["text"]))
    (clean.loss + 0.7 * module.objectives["vqa"].divergence(noisy.logits, clean.logits)).backward()
    assert_same(gradients, {key: value.grad for key, value in module.named_parameters() if value.grad is not None})


def test_detached_clean_differs_from_joint() -> None:
    module = tiny_module("vqa")
    joint, _, _ = run(AdversaryConfig(modality="both", **STRONG), module, "vqa")
    detached, _, _ = run(AdversaryConfig(modality="both", clean="detached", **STRONG), module, "vqa")
    assert any((joint[name] - detached[name]).abs().max() > 1e-3 for name in joint)


def test_ascent_raises_the_loss_and_padding_stays_zero() -> None:
    module = tiny_module("vqa")
    small = {"text": ModalityConfig(0.05), "image": ModalityConfig(0.05)}
    _, _, records = run(AdversaryConfig(steps=4, modality="both", kl_weight=0.0, **small), module, "vqa")
    losses = [float(record.loss) for record in records]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]
    batch = tiny_batch(module.objectives["vqa"])
    last = records[-1].deltas
    assert not last["text"][~batch.text_valid].any()
    assert not last["regions"][~batch.region_valid].any()
    assert last["text"][batch.text_valid].any()


def valid_batch() -> Batch:
    return tiny_batch(tiny_module("vqa").objectives["vqa"])


@pytest.mark.parametrize(("init", "norm"), list(itertools.product(["uniform", "normal"], ["l2", "linf"])))
def test_initial_noise(init: str, norm: str) -> None:
    """Bounds of Algorithm 1, line 4; the same for the same seed; zero at padding."""
    batch, size, width = valid_batch(), 0.4, 600
    config = AdversaryConfig(init=init, norm=norm, text=ModalityConfig(init_norm=size))
    like = torch.empty(*batch.input_ids.shape, width, dtype=torch.float64)
    noise = initial_delta(config, config.text, like, batch.text_valid, seed=3)
    assert torch.equal(noise, initial_delta(config, config.text, like, batch.text_valid, seed=3))
    assert not torch.equal(noise, initial_delta(config, config.text, like, batch.text_valid, seed=4))
    assert not noise[~batch.text_valid].any()
    if norm == "l2":
        expected = size * (1 if init == "normal" else 1 / math.sqrt(3))
        torch.testing.assert_close(
            row_norm(noise, "l2").flatten(), torch.full((4,), expected).double(), rtol=0.1, atol=0
        )
    elif init == "uniform":
        assert noise.abs().max() <= size


def test_ascend_row_by_row() -> None:
    delta = torch.zeros(3, 2, 2, dtype=torch.float64)
    gradient = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0] * 2] * 2, [[math.nan] * 2] * 2], dtype=torch.float64)
    moved = ascend(delta, gradient, "l2", step_size=2.0, max_norm=0.0)
    torch.testing.assert_close(moved[0], torch.tensor([[1.2, 0.0], [0.0, 1.6]], dtype=torch.float64))
    assert not moved[1:].any(), "a row without a usable gradient stays where it was"
    bounded = ascend(delta, gradient, "l2", step_size=2.0, max_norm=0.5)
    assert float(row_norm(bounded, "l2")[0]) == pytest.approx(0.5)
    assert not bounded[1:].isnan().any(), "the release gets NaN for an all-zero row with a bound"
    torch.testing.assert_close(
        ascend(delta, gradient, "linf", 2.0, 1.0)[0], torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    )
    assert torch.equal(project(moved, "l2", 0.0), moved)


def test_warmup_strength_scales_steps_and_noise() -> None:
    module = tiny_module("vqa")
    objective, batch = module.objectives["vqa"], tiny_batch(module.objectives["vqa"])
    config = AdversaryConfig(steps=2, text=ModalityConfig(0.6))
    norms = []
    for strength in (1.0, 0.25):
        records: list[PassRecord] = []
        Adversary(config).accumulate(
            ModulePasses(module, batch, "vqa"), batch, objective.divergence, (16, 12), 0, strength, records.append
        )
        norms.append(row_norm(records[1].deltas["text"], "l2"))
    torch.testing.assert_close(norms[1], 0.25 * norms[0])
