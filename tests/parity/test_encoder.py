"""The encoder alone: embeddings, every layer's states and the pooled state."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.parity.batches import batch_of
from tests.parity.golden import DTYPES, Case, cases
from tests.parity.modules import module_of
from villa_ds.batch import Batch, Embeddings, Reads
from villa_ds.models.uniter import UniterBackbone, joint_layout


@contextmanager
def layer_states(backbone: UniterBackbone) -> Iterator[list[Tensor]]:
    """Input of the first layer and output of every layer, as a forward pass goes by."""
    states: list[Tensor] = []
    layers = backbone.encoder.layer
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda *call: states.append(call[-1])) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def assert_layout(batch: Batch, inputs: dict[str, Tensor]) -> None:
    """Our arithmetic gives the reference's stored mask, gather index and positions."""
    layout = joint_layout(batch)
    torch.testing.assert_close(layout.valid.to(torch.int64), inputs["attn_masks"])
    if "gather_index" in inputs:
        torch.testing.assert_close(layout.slots, inputs["gather_index"])
    if "position_ids" in inputs:
        torch.testing.assert_close(torch.arange(batch.input_ids.shape[1])[None], inputs["position_ids"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("encoder"))
def test_encoder(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    backbone = module_of(case, dtype).backbone
    assert isinstance(backbone, UniterBackbone)
    batch = batch_of(inputs, Reads.ALL, feature_width=backbone.feature_width)
    assert_layout(batch, inputs)
    with layer_states(backbone) as states:
        encoded = backbone.encode(backbone.embed(batch), batch)

    valid = inputs["attn_masks"].bool()
    with case.expectations(dtype) as expected:
        # Padding too: our layout puts there what the reference's does.
        expected.check("embedding_output", states[0])
        for number, state in enumerate(states[1:], start=1):
            expected.check(f"hidden_{number:02}", state)
        assert encoded.pooled is not None
        expected.check("pooled_output", encoded.pooled)

    by_slot = torch.cat([batch.text_valid, batch.region_valid], dim=1)
    torch.testing.assert_close(encoded.states[by_slot], states[-1][valid], rtol=0, atol=0)
    assert not encoded.states[~by_slot].any()


@pytest.mark.parametrize("case", cases("encoder"))
def test_a_perturbation_of_zero_changes_nothing(case: Case) -> None:
    backbone = module_of(case, torch.float64).backbone
    batch = batch_of(case.inputs(torch.float64), Reads.POOLED, feature_width=backbone.feature_width)
    seam = backbone.embed(batch)
    moved = Embeddings(seam.text + torch.zeros_like(seam.text), seam.regions + torch.zeros_like(seam.regions))
    plain, same = backbone.encode(seam, batch).pooled, backbone.encode(moved, batch).pooled
    torch.testing.assert_close(plain, same, rtol=0, atol=0)
