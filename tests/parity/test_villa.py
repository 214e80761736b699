"""The adversarial step against VILLA's released loop: every ascent step and every parameter gradient."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.batches import batch_of, targets_of
from tests.parity.golden import DTYPES, Case, Expectations, cases
from tests.parity.modules import gradients, module_of
from tests.parity.test_encoder import assert_layout
from tests.passes import ModulePasses
from villa_ds.batch import Batch, Perturbation
from villa_ds.config import AdversaryConfig, ModalityConfig
from villa_ds.train.adversary import Adversary, PassRecord, ascend
from villa_ds.train.module import TrainModule

NAMES = {"text": "txt", "regions": "img"}


def config_of(hyper: dict[str, Any], schedule: str, clean: str = "joint") -> AdversaryConfig:
    """The released options as settings; "alter" only moves what is also named (FACTS section 6)."""
    names = set(hyper["adv_modality"])
    moving = names - {"alter"}
    modality = "alternate" if "alter" in names else "both" if len(moving) == 2 else moving.pop()
    bound = float(hyper["adv_max_norm"])
    rates = {"text": hyper["adv_lr_txt"], "image": hyper["adv_lr_img"]}
    if "alter" in names:
        rates = {name: rate if name in names else 0.0 for name, rate in rates.items()}
    return AdversaryConfig(
        steps=hyper["adv_steps"], modality=modality, norm=hyper["norm_type"], kl_weight=float(hyper["adv_kl_weight"]),
        text=ModalityConfig(rates["text"], bound), image=ModalityConfig(rates["image"], bound),
        schedule=schedule, clean=clean,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["textbook", "exact", "exact without a kept clean graph"])
@pytest.mark.parametrize("case", cases("villa"))
def test_released_step(case: Case, schedule: str, dtype: torch.dtype) -> None:
    hyper = case.spec["hyper"]
    module = module_of(case, dtype)
    config = config_of(hyper, schedule.partition(" ")[0])
    ((name, objective),) = module.objectives.items()
    assert name == case.spec["task"]
    with case.expectations(dtype) as expected:
        count = hyper["gradient_accumulation_steps"]
        for number in range(count):
            prefix = f"micro{number}/" if count > 1 else ""
            inputs = case.inputs(dtype, prefix)
            batch = batch_of(inputs, objective.reads, targets_of(name, inputs))
            assert_layout(batch, inputs)
            records: list[PassRecord] = []
            passes = ModulePasses(module, batch, name, keeps_clean_graph="without" not in schedule)
            widths = (module.backbone.hidden_size, module.backbone.feature_width)
            clean = Adversary(config).accumulate(
                passes, batch, objective.divergence, widths, seed=0, observe=records.append
            )
            assert clean is not None
            assert passes.finals == 1
            expected.check(f"{prefix}clean_scores", clean.logits)
            check_ascent(expected, prefix, config, records, Trained(module, name, batch), clean.logits.detach())
        check_gradients(expected, case, module)


@dataclass(frozen=True)
class Trained:
    """What an ascent is of."""

    module: TrainModule
    objective: str
    batch: Batch


def check_ascent(
    expected: Expectations, prefix: str, config: AdversaryConfig, records: list[PassRecord],
    trained: Trained, anchor: Tensor,
) -> None:  # fmt: skip
    """Losses, logits, perturbations and their gradients of every ascent step."""
    alternates = config.modality == "alternate"
    weight = 1.0 / (config.steps * (2 if alternates else 1))
    for step in range(config.steps):
        of_step = [record for record in records if record.step == step]
        assert len(of_step) == (2 if alternates else 1)
        total = sum(weight * (record.loss + config.kl_weight * record.divergence) for record in of_step)
        expected.check(f"{prefix}step{step}/loss", total)
        for record in of_step:
            suffix = "_" + NAMES[next(iter(record.deltas))] if alternates else ""
            expected.check(f"{prefix}step{step}/task_loss{suffix}", record.loss)
            expected.check(f"{prefix}step{step}/kl_loss{suffix}", record.divergence)
            expected.check(f"{prefix}step{step}/scores{suffix}", record.logits)
            gradients = record.gradients or last_gradients(record, weight, config, trained, anchor)
            for name, delta in record.deltas.items():
                expected.check(f"{prefix}step{step}/{NAMES[name]}_delta", delta)
                expected.check(f"{prefix}step{step}/{NAMES[name]}_delta_grad", gradients[name])


def last_gradients(
    record: PassRecord, weight: float, config: AdversaryConfig, trained: Trained, anchor: Tensor
) -> dict[str, Tensor]:
    """The release computes the perturbations' gradient after the last step too and throws it away; we never do."""
    leaves = {name: delta.clone().requires_grad_() for name, delta in record.deltas.items()}
    perturbation = Perturbation(leaves.get("text"), leaves.get("regions"))
    output = trained.module(trained.batch, trained.objective, perturbation)
    kl = trained.module.objectives[trained.objective].divergence(output.logits, anchor)
    scalar = weight * (output.loss + config.kl_weight * kl)
    return dict(zip(leaves, torch.autograd.grad(scalar, list(leaves.values())), strict=True))


def check_gradients(expected: Expectations, case: Case, module: TrainModule) -> None:
    """Every parameter's accumulated gradient under its reference name; the rest have none."""
    reference = gradients(module)
    for name in list(expected.names("grad/")):
        expected.check(name, reference.pop(name.removeprefix("grad/")))
    assert sorted(reference) == sorted(case.spec["params_without_grad"])
    assert all(not gradient.any() for gradient in reference.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("villa_delta_update"))
def test_delta_update(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    with case.expectations(dtype) as expected:
        for number, update in enumerate(case.spec["hyper"]["updates"]):
            delta, gradient = inputs[f"u{number}/delta"], inputs[f"u{number}/grad"]
            moved = ascend(delta, gradient, update["norm_type"], update["adv_lr"], float(update["adv_max_norm"]))
            (name,) = expected.names(f"u{number}/")
            expected.check(name, moved)
