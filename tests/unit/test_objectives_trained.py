"""Downstream objectives from sample to gradient: prepared, collated, one pass of a tiny model, in every precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny import MANIFEST, tiny_module
from tests.unit.pairs import regions_of, sample_of
from villa_ds.batch import Batch, ImageSpan, Perturbation, Sample
from villa_ds.config_objectives import Nlvr2Config, ObjectivesConfig, RefexpConfig
from villa_ds.data.collate import collate
from villa_ds.models.uniter import UniterBackbone
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.rng import Stream
from villa_ds.train.module import TrainModule

CASES = {
    "ve": ObjectivesConfig(),
    "vcr": ObjectivesConfig(),
    "refexp": ObjectivesConfig(),
    "retrieval": ObjectivesConfig(),
    "nlvr2": ObjectivesConfig(),
    "nlvr2 paired": ObjectivesConfig(nlvr2=Nlvr2Config(form="paired")),
    "nlvr2 triplet": ObjectivesConfig(nlvr2=Nlvr2Config(form="triplet")),
    "refexp rank": ObjectivesConfig(refexp=RefexpConfig(loss="rank", layers=2, margin=1.0)),
}
UNUSED = {"rank_output.beside.itm_output.weight", "rank_output.beside.itm_output.bias"}


def module_of(case: str) -> tuple[TrainModule, Objective]:
    objective = build_objective(case.split(maxsplit=1)[0], CASES[case], replace(MANIFEST, answers=()))
    sizes = replace(tiny_module().backbone.sizes, type_vocab_size=len(objective.adaptation.type_rows))
    torch.manual_seed(0)
    return TrainModule(UniterBackbone(sizes), [objective]), objective


def sample_number(number: int) -> Sample:
    regions = regions_of(4 + number, f"image {number}")
    target = {
        "labels": [number % 3], "scores": [1.0], "label": number % 2, "region": number % 4,
        "answers": [[20 + number], [21, 22], [23], [24]], "rationales": [[30], [31 + number], [32], [33]],
        "answer": number % 4, "rationale": (number + 1) % 4,
    }  # fmt: skip
    images = (ImageSpan("left", 0, 2), ImageSpan("right", 2, 4 + number))
    sample = sample_of(tuple(range(5, 8 + number)), replace(regions, images=images), target, regions_of(3, "other"))
    return replace(sample, id=f"s{number}", negative_texts=[[40, 41 + number]])


def batch_of(objective: Objective, numbers: range) -> Batch:
    examples = [objective.prepare(sample_number(number), Stream("prepare", number)) for number in numbers]
    return collate(examples, objective.reads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_one_pass(case: str, dtype: torch.dtype) -> None:
    module, objective = module_of(case)
    module.to(dtype)
    batch = batch_of(objective, range(3))
    assert len(batch) == 3 * objective.rows
    plain = module(batch, objective.name)
    delta = torch.zeros(*batch.input_ids.shape, 16, requires_grad=True)
    output = module(batch, objective.name, Perturbation(text=delta))
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, plain.loss)
    (output.loss + objective.divergence(output.logits, plain.logits.detach())).backward()
    head = {f"{objective.head_name}.{name}": value for name, value in module.head_of(objective.name).named_parameters()}
    assert {name for name, value in head.items() if value.grad is None} == UNUSED & set(head)
    for value in head.values():
        assert value.grad is None or value.grad.isfinite().all()
    assert delta.grad is not None
    assert delta.grad.isfinite().all()
    assert not delta.grad[~batch.text_valid].any()
    assert (delta.grad.abs().sum((1, 2)) > 0).all()  # each row has its own
    assert len(objective.predictions(output, batch)) == len(batch.ids) == 3


@pytest.mark.parametrize("case", CASES)
def test_a_sample_s_result_is_its_own(case: str) -> None:
    """What else is in the batch, and how far it is padded, changes nothing."""
    module, objective = module_of(case)
    together = batch_of(objective, range(3))
    rows = objective.predictions(module(together, objective.name), together)
    for number, expected in enumerate(rows):
        alone = batch_of(objective, range(number, number + 1))
        (found,) = objective.predictions(module(alone, objective.name), alone)
        assert set(found) == set(expected)
        for key, value in found.items():
            if isinstance(value, float | list):
                np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-5, err_msg=key)  # type: ignore[arg-type]
            else:
                assert value == expected[key]
