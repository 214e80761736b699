"""Hard negatives: which candidates are kept, the loss over them and its gradients, for either anchor."""

import numpy as np
import pytest
import torch

from tests.parity.batches import batch_of
from tests.parity.golden import DTYPES, Case, cases
from tests.parity.modules import gradients, module_of
from villa_ds.batch import Batch, Reads
from villa_ds.config import EngineConfig, OptimizerConfig
from villa_ds.objectives.retrieval import IMAGE, TEXT, HardNegativeRetrieval
from villa_ds.train.step import StepInput, micro_batches
from villa_ds.train.torch_engine import TorchEngine

ANCHORS = {"t": TEXT, "i": IMAGE}


def query_of(case: Case, dtype: torch.dtype) -> Batch:
    """A case's single query; what its rows share is stored once, and lengths follow from padding."""
    inputs = case.inputs(dtype)
    rows = len(inputs["attn_masks"])
    for name in ("input_ids", "img_feat", "img_pos_feat"):
        inputs[name] = inputs[name].expand(rows, *inputs[name].shape[1:])
    inputs["txt_lens"] = (inputs["input_ids"] != 0).sum(1)
    inputs["num_bbs"] = inputs["attn_masks"].sum(1) - inputs["txt_lens"]
    anchor = torch.tensor([ANCHORS[case.spec["hyper"]["sample_from"]]])
    return batch_of(inputs, Reads.POOLED, {"anchor": anchor})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("itm_hard_negative"))
def test_hard_negatives(case: Case, dtype: torch.dtype) -> None:
    module, batch = module_of(case, dtype), query_of(case, dtype)
    ((name, objective),) = module.objectives.items()
    assert isinstance(objective, HardNegativeRetrieval)
    engine = TorchEngine(module, EngineConfig(device="cpu"), OptimizerConfig())
    engine.module.to(dtype)
    with torch.no_grad():
        everything = engine.probe(batch, name, None)
    kept = objective.kept_rows(everything, batch)
    (micro,) = micro_batches(engine, StepInput(1, 0, objective, (batch,), (0,)))
    assert module.training
    output = micro.forward(None, 0)
    total = output.loss / case.spec["hyper"]["train_batch_size"]
    total.backward()
    found = gradients(module)
    with case.expectations(dtype) as expected:
        expected.check("all_scores", everything.logits)
        assert kept[0] == 0
        expected.check("hard_indices_sorted", kept[1:].sort().values)
        expected.check("hard_batch_size", np.array(len(micro.batch)))
        # The release cuts the batch to what is kept only where images are chosen; what it leaves uncut is padding.
        cut = micro.batch if case.spec["hyper"]["sample_from"] == "t" else batch
        expected.check("hard_seq_len", np.array(cut.joint_length))
        expected.check("hard_num_bb", np.array(cut.features.shape[1]))
        expected.check("loss_sorted", output.elements.flatten().sort().values)
        expected.check("loss_total", total)
        for gradient_name in expected.names("grad/"):
            expected.check(gradient_name, found[gradient_name.removeprefix("grad/")])
