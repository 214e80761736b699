"""Pre-training objectives: predictions, losses and parameter gradients."""

import pytest
import torch
from torch import Tensor

from tests.parity.batches import batch_of, slot_mask
from tests.parity.golden import DTYPES, Case, Expectations, cases
from tests.parity.modules import gradients, module_of
from tests.parity.test_encoder import assert_layout
from villa_ds.batch import Batch
from villa_ds.models.uniter import joint_positions
from villa_ds.objectives.itm import ImageTextMatching, alignment_loss
from villa_ds.objectives.mrm import hard_classes
from villa_ds.train.module import TrainModule


def targets_of(task: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored targets of a task as its objective packs them."""
    if task == "mlm":
        return {"word_pieces": inputs["txt_labels"][inputs["txt_labels"] != -1]}
    if task == "mrfr":
        return {"regions": inputs["feat_targets"]}
    if task == "mrc":
        return {"regions": torch.from_numpy(hard_classes(inputs["label_targets"].numpy()))}
    if task == "mrckl":
        return {"regions": inputs["label_targets"]}
    return {"matched": inputs["targets"]}


def assert_inputs(batch: Batch, inputs: dict[str, Tensor]) -> None:
    """Stored arrays that we compute instead of reading are what we compute."""
    assert_layout(batch, inputs)
    length = batch.input_ids.shape[1]
    if "img_mask_tgt" in inputs:
        mask = slot_mask(inputs)
        assert mask is not None
        rows, slots = mask.nonzero(as_tuple=True)
        joint = torch.zeros_like(inputs["img_mask_tgt"])
        joint[rows, joint_positions(batch, torch.arange(mask.shape[1]).expand_as(mask))[rows, slots]] = True
        torch.testing.assert_close(joint, inputs["img_mask_tgt"])
        assert not inputs["img_feat"][inputs["img_masks"]].any()
    if "ot_scatter" in inputs:
        positions, lengths = torch.arange(batch.joint_length), batch.text_lengths[:, None]
        scatter = torch.where(positions < lengths, positions, length + positions - lengths)
        torch.testing.assert_close(inputs["ot_scatter"], scatter)
        torch.testing.assert_close(inputs["scatter_max"], scatter.max())
        torch.testing.assert_close(inputs["txt_pad"], ~batch.text_valid)
        torch.testing.assert_close(inputs["img_pad"], ~batch.region_valid)


def check_itm(module: TrainModule, batch: Batch, loss: Tensor, elements: Tensor, expected: Expectations) -> None:
    expected.check("itm_loss", elements)
    expected.check("itm_loss_mean", elements.mean())
    if "ot_loss" not in expected:
        return
    objective = module.objectives["itm"]
    assert isinstance(objective, ImageTextMatching)
    backbone = module.backbone
    plan = objective.align(backbone.encode(backbone.embed(batch), batch), batch)
    matched = batch.targets["matched"]
    alignment = alignment_loss(plan.distance, matched)
    expected.check("ot_cost", plan.cost)
    expected.check("ot_plan", plan.plan)
    expected.check("ot_dist", plan.distance)
    expected.check("ot_pos", plan.distance[matched == 1])
    expected.check("ot_neg", plan.distance[matched == 0])
    expected.check("ot_loss", alignment)
    torch.testing.assert_close(loss, elements.mean() + objective.settings.ot_weight * alignment)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("pretrain"))
def test_pretraining(case: Case, dtype: torch.dtype) -> None:
    task = case.spec["task"]
    module, inputs = module_of(case, dtype), case.inputs(dtype)
    batch = batch_of(inputs, module.objectives[task].reads, targets_of(task, inputs))
    assert_inputs(batch, inputs)
    output = module(batch, task)
    output.loss.backward()
    with case.expectations(dtype) as expected:
        if task == "itm":
            expected.check("itm_scores", output.logits)
            check_itm(module, batch, output.loss, output.elements, expected)
        else:
            expected.check("predictions", output.logits)
            expected.check("loss_elementwise", output.elements)
        expected.check("loss_total", output.loss)
        found = gradients(module)
        for name in expected.names("grad/"):
            expected.check(name, found[name.removeprefix("grad/")])
