"""Optimal transport: cost, plan, distance and the gradients of the distance."""

import pytest
import torch

from tests.parity.golden import DTYPES, Case, cases
from villa_ds.objectives.ot import transport


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("ot"))
def test_transport(case: Case, dtype: torch.dtype) -> None:
    inputs, hyper = case.inputs(dtype), case.spec["hyper"]
    assert hyper["k"] == 1, "the reference only works with one inner iteration, which is what is built"
    text, regions = inputs["txt_emb"].requires_grad_(), inputs["img_emb"].requires_grad_()
    result = transport(
        text, regions, ~inputs["txt_pad"], ~inputs["img_pad"], beta=hyper["beta"], iterations=hyper["iteration"]
    )
    result.distance.sum().backward()
    with case.expectations(dtype) as expected:
        expected.check("cost", result.cost)
        expected.check("plan", result.plan)
        expected.check("distance", result.distance)
        assert text.grad is not None
        assert regions.grad is not None
        expected.check("grad/txt_emb", text.grad)
        expected.check("grad/img_emb", regions.grad)


@pytest.mark.parametrize("case", cases("ot"))
def test_padding_does_not_matter(case: Case) -> None:
    inputs, hyper = case.inputs(torch.float64), case.spec["hyper"]
    settings = {"beta": hyper["beta"], "iterations": hyper["iteration"]}
    text_valid, region_valid = ~inputs["txt_pad"], ~inputs["img_pad"]
    together = transport(inputs["txt_emb"], inputs["img_emb"], text_valid, region_valid, **settings)
    for row, (words, regions) in enumerate(zip(text_valid, region_valid, strict=True)):
        text, image = inputs["txt_emb"][row, words][None], inputs["img_emb"][row, regions][None]
        alone = transport(text, image, words[words][None], regions[regions][None], **settings)
        torch.testing.assert_close(together.plan[row][regions][:, words], alone.plan[0])
        torch.testing.assert_close(together.distance[row], alone.distance[0])
        # A plan moves all of a pair's mass, the same from every region and to every word.
        torch.testing.assert_close(alone.plan[0].sum(0), torch.full_like(text[0, :, 0], 1 / int(words.sum())))
