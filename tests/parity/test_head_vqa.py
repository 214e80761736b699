"""Downstream heads: scores, losses and parameter gradients."""

import pytest
import torch

from tests.parity.batches import batch_of
from tests.parity.golden import DTYPES, Case, cases
from tests.parity.modules import BUILT, gradient, module_of
from tests.parity.test_encoder import assert_layout

# Reference class -> objective and the name of its target.
OBJECTIVES = {"UniterForVisualQuestionAnswering": ("vqa", "scores")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("head", "itm_hard_negative"))
def test_head(case: Case, dtype: torch.dtype) -> None:
    name = case.spec["model"]["class"]
    if name not in BUILT:
        pytest.skip(f"head {name} is built with the downstream tasks")
    objective, target = OBJECTIVES[name]
    module, inputs = module_of(case, dtype), case.inputs(dtype)
    batch = batch_of(inputs, module.objectives[objective].reads, {target: inputs["targets"]})
    assert_layout(batch, inputs)
    output = module(batch, objective)
    output.loss.backward()
    with case.expectations(dtype) as expected:
        expected.check("scores", output.logits)
        expected.check("loss_elementwise", output.elements)
        expected.check("loss_total", output.loss)
        for gradient_name in expected.names("grad/"):
            expected.check(gradient_name, gradient(module, gradient_name.removeprefix("grad/")))
