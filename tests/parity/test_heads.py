"""Downstream heads: scores, losses and parameter gradients."""

import pytest
import torch

from tests.parity.batches import batch_of, targets_of
from tests.parity.golden import DTYPES, Case, cases
from tests.parity.modules import gradients, module_of
from tests.parity.test_encoder import assert_layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("head"))
def test_head(case: Case, dtype: torch.dtype) -> None:
    module, inputs = module_of(case, dtype), case.inputs(dtype)
    ((name, objective),) = module.objectives.items()
    batch = batch_of(inputs, objective.reads, targets_of(name, inputs))
    assert_layout(batch, inputs)
    output = module(batch, name)
    factor = len(batch) if case.spec.get("loss_reduction") == "sum" else 1  # our loss is a mean
    total = factor * output.loss
    total.backward()
    found = gradients(module)
    with case.expectations(dtype) as expected:
        # VCR: UNITER returns the logit of "right" only, and a mean as its elements.
        expected.check("scores", output.logits[:, 1:] if name == "vcr" else output.logits)
        expected.check("loss_elementwise", output.elements.mean() if name == "vcr" else output.elements)
        expected.check("loss_total", total)
        if "neg_ix" in expected:
            expected.check("neg_ix", objective.negatives(output.logits, batch))
        for gradient_name in expected.names("grad/"):
            expected.check(gradient_name, found[gradient_name.removeprefix("grad/")])
