"""An optimizer step: what its gradient is the mean of, and which dropout masks its passes draw."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_batch, tiny_module
from villa_ds.batch import Batch
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, OptimizerConfig
from villa_ds.estimate import LiveBytes
from villa_ds.models import products
from villa_ds.train.adversary import Adversary, PassRecord
from villa_ds.train.step import StepInput, adversarial_step, micro_batches, train_step
from villa_ds.train.torch_engine import TorchEngine

STRONG = {"text": ModalityConfig(0.7, 0.9, 0.5), "image": ModalityConfig(0.5, 0.8, 0.5)}
LANES = 4


def engine_of(*names: str, dropout: float = 0.0) -> TorchEngine:
    """In float64, which the engine's own precisions leave out."""
    module = tiny_module(*names, dropout=dropout)
    engine = TorchEngine(module, EngineConfig(device="cpu"), OptimizerConfig())
    engine.module.double()
    return engine


def lane_batches(engine: TorchEngine, name: str) -> list[Batch]:
    """Micro-batches of unequal size: a mean over rows is not the mean of means."""
    objective = engine.module.objectives[name]
    return [tiny_batch(objective, rows=2 + lane, start=10 * lane) for lane in range(LANES)]


def work_of(engine: TorchEngine, name: str, lanes: Sequence[int], step: int = 1, seed: int = 0) -> StepInput:
    batches = lane_batches(engine, name)
    return StepInput(step, seed, engine.module.objectives[name], tuple(batches[lane] for lane in lanes), tuple(lanes))


def gradients(engine: TorchEngine) -> dict[str, Tensor]:
    """The accumulated gradients, which are then dropped."""
    found = {name: value.grad.clone() for name, value in engine.module.named_parameters() if value.grad is not None}
    engine.module.zero_grad(set_to_none=True)
    return found


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def plain(engine: TorchEngine, work: StepInput) -> dict[str, Tensor]:
    train_step(engine, work)
    return gradients(engine)


def adversarial(engine: TorchEngine, work: StepInput, config: AdversaryConfig) -> dict[str, Tensor]:
    adversarial_step(engine, work, Adversary(config), strength=1.0)
    return gradients(engine)


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


@pytest.mark.parametrize("name", ["mlm", "itm"])
def test_the_gradient_is_the_unweighted_mean_of_the_micro_batches_own_means(name: str) -> None:
    engine = engine_of("mlm", "itm")
    parts = []
    for batch in lane_batches(engine, name):
        engine.module(batch, name).loss.backward()
        parts.append(gradients(engine))
    assert_close(plain(engine, work_of(engine, name, range(LANES))), mean_of(parts))


@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[0], [1], [2], [3]]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sharing_the_lanes_does_not_change_the_gradient(split: list[list[int]], dropout: float) -> None:
    """The mean over ranks (what an engine of several ranks forms) of each rank's gradient is one rank's."""
    engine = engine_of("mlm", dropout=dropout)
    config = AdversaryConfig(steps=2, modality="both", init="uniform", **STRONG)
    together = work_of(engine, "mlm", range(LANES))
    shares = [work_of(engine, "mlm", lanes) for lanes in split]
    assert_close(mean_of([plain(engine, share) for share in shares]), plain(engine, together))
    apart = mean_of([adversarial(engine, share, config) for share in shares])
    assert_close(apart, adversarial(engine, together, config))


def test_only_the_last_pass_of_the_last_micro_batch_is_a_boundary() -> None:
    engine = engine_of("mlm")
    boundaries: list[bool] = []
    backward = engine.backward

    def observed(scalar: Tensor, *, boundary: bool, retain_graph: bool = False) -> None:
        boundaries.append(boundary)
        backward(scalar, boundary=boundary, retain_graph=retain_graph)

    engine.backward = observed  # type: ignore[method-assign]
    plain(engine, work_of(engine, "mlm", range(3)))
    assert boundaries == [False, False, True]
    boundaries.clear()
    adversarial(engine, work_of(engine, "mlm", range(2)), AdversaryConfig(steps=3, modality="text", **STRONG))
    assert boundaries == [False] * 5 + [True]


def test_sums_are_of_all_micro_batches() -> None:
    engine = engine_of("itm")
    sums = train_step(engine, work_of(engine, "itm", range(LANES)))
    rows = sum(len(batch) for batch in lane_batches(engine, "itm"))
    losses = [engine.module(batch, "itm").sums["loss"] for batch in lane_batches(engine, "itm")]
    assert sum(int(count) for _, count in losses) == rows
    expected = float(sum(total for total, _ in losses)) / rows
    assert sums.means(lambda flat: flat)["loss"] == pytest.approx(expected, rel=1e-12)


def test_adversarial_sums() -> None:
    """Clean loss by rows; perturbed loss, divergence and perturbation norms by pass."""
    engine = engine_of("itm")
    config = AdversaryConfig(steps=3, modality="text", text=ModalityConfig(0.7), clean_weight=1.0)
    sums = adversarial_step(engine, work_of(engine, "itm", [0, 1]), Adversary(config), strength=1.0)
    table = dict(zip(sums.names, sums.flat().view(-1, 2).tolist(), strict=True))
    assert table["perturbed_loss"][1] == table["kl"][1] == 2 * 3
    assert table["nonfinite_ascents"] == [0.0, 6.0]
    rows = 2 + 3
    assert table["text_perturbation_norm"][1] == 2 * rows  # not of step 0, which has none
    means = sums.means(lambda flat: flat)
    assert 0.7 < means["text_perturbation_norm"] < 1.4  # after one step 0.7, after two steps up to 1.4
    assert means["kl"] > 0
    assert "regions_perturbation_norm" not in means


def test_strength_scales_the_ascent() -> None:
    engine = engine_of("itm")
    config = AdversaryConfig(steps=2, modality="text", text=ModalityConfig(0.7))
    norms = {}
    for strength in (1.0, 0.25, 0.0):
        sums = adversarial_step(engine, work_of(engine, "itm", [0, 1]), Adversary(config), strength=strength)
        norms[strength] = sums.means(lambda flat: flat)["text_perturbation_norm"]
    assert norms[1.0] == pytest.approx(0.7)
    assert norms[0.25] == pytest.approx(0.175)
    assert norms[0.0] == 0.0


def masks_of(engine: TorchEngine, work: StepInput, draws: Sequence[int]) -> list[Tensor]:
    """The logits of clean passes of the first micro-batch: with dropout on, a fingerprint of the masks."""
    (micro,) = list(micro_batches(engine, dataclasses.replace(work, batches=work.batches[:1], lanes=work.lanes[:1])))
    return [micro.probe(None, draw).logits.detach() for draw in draws]


def test_masks_are_keyed_by_seed_step_micro_batch_and_pass() -> None:
    engine = engine_of("itm", dropout=0.3)
    batch = lane_batches(engine, "itm")[0]
    objective = engine.module.objectives["itm"]

    def logits(seed: int, step: int, lane: int, draw: int) -> Tensor:
        return masks_of(engine, StepInput(step, seed, objective, (batch,), (lane,)), [draw])[0]

    first = logits(0, 1, 0, 0)
    assert torch.equal(logits(0, 1, 0, 0), first)
    others = [logits(1, 1, 0, 0), logits(0, 2, 0, 0), logits(0, 1, 1, 0), logits(0, 1, 0, 1)]
    for index, other in enumerate([first, *others]):
        for later in [first, *others][index + 1 :]:
            assert not torch.allclose(other, later)


def test_masks_do_not_depend_on_history_position_or_how_a_pass_is_run() -> None:
    engine = engine_of("itm", dropout=0.3)
    work = work_of(engine, "itm", [2, 3])
    alone = masks_of(engine, work_of(engine, "itm", [3]), [0])[0]
    torch.manual_seed(99)
    torch.rand(17)
    _, second = micro_batches(engine, work)  # lane 3, now the rank's second
    for run in (second.forward, second.forward_kept, second.probe):
        assert torch.equal(run(None, 0).logits.detach(), alone)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_global_generator_is_untouched(dropout: float) -> None:
    engine = engine_of("mlm", dropout=dropout)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    plain(engine, work_of(engine, "mlm", range(2)))
    config = AdversaryConfig(steps=2, modality="both", init="normal", **STRONG)
    adversarial(engine, work_of(engine, "mlm", range(2)), config)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_generator_comes_back_after_an_error() -> None:
    engine = engine_of("mlm", dropout=0.3)
    state = torch.get_rng_state()
    (micro,) = micro_batches(engine, work_of(engine, "mlm", [0]))
    with pytest.raises(RuntimeError, match="inside"), micro._dropout_masks(0):
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), state)


def records_of(engine: TorchEngine, config: AdversaryConfig) -> list[PassRecord]:
    """Passes of one micro-batch under a perturbation of size zero: only the masks can make them differ."""
    work = work_of(engine, "itm", [1])
    records: list[PassRecord] = []
    (micro,) = micro_batches(engine, work)
    adversary = Adversary(config)
    widths = (engine.module.backbone.hidden_size, engine.module.backbone.feature_width)
    adversary.accumulate(
        micro, micro.batch, work.objective.divergence, widths, seed=1, strength=0.0, observe=records.append
    )
    engine.module.zero_grad(set_to_none=True)
    return records


@pytest.mark.parametrize("schedule", ["exact", "textbook"])
@pytest.mark.parametrize("modality", ["both", "alternate"])
def test_shared_masks_are_shared_and_independent_ones_differ_in_every_pass(schedule: str, modality: str) -> None:
    engine = engine_of("itm", dropout=0.3)
    shared = AdversaryConfig(steps=3, modality=modality, dropout="shared", schedule=schedule, **STRONG)
    found = records_of(engine, shared)
    assert len(found) == (6 if modality == "alternate" else 3)
    clean = masks_of(engine, work_of(engine, "itm", [1]), [0])[0]
    for record in found:
        torch.testing.assert_close(record.logits, clean, rtol=1e-12, atol=1e-12)
        assert abs(float(record.divergence)) < 1e-12
    independent = dataclasses.replace(shared, dropout="independent")
    different = [clean, *(record.logits for record in records_of(engine, independent))]
    for index, left in enumerate(different):
        for right in different[index + 1 :]:
            assert not torch.allclose(left, right)


def test_without_dropout_the_policies_are_the_same() -> None:
    engine = engine_of("itm")
    shared = AdversaryConfig(steps=2, modality="both", dropout="shared", **STRONG)
    work = work_of(engine, "itm", [0, 1])
    independent = adversarial(engine, work, dataclasses.replace(shared, dropout="independent"))
    assert_close(adversarial(engine, work, shared), independent)


def test_the_initial_noise_is_keyed_by_step_and_lane() -> None:
    engine = engine_of("itm")
    config = AdversaryConfig(steps=1, modality="text", init="uniform", kl_weight=0.0, **STRONG)

    def gradient(step: int, lane: int, seed: int = 0) -> Tensor:
        batch = lane_batches(engine, "itm")[0]
        work = StepInput(step, seed, engine.module.objectives["itm"], (batch,), (lane,))
        return adversarial(engine, work, config)["uniter.pooler.dense.weight"]

    first = gradient(1, 0)
    assert torch.equal(gradient(1, 0), first)
    for other in (gradient(2, 0), gradient(1, 1), gradient(1, 0, seed=1)):
        assert not torch.allclose(other, first)


def test_gradient_scale_is_the_micro_batchs_weight() -> None:
    engine = engine_of("mlm")
    scales = [micro.gradient_scale for micro in micro_batches(engine, work_of(engine, "mlm", range(4)))]
    assert scales == [0.25] * 4


def test_passes_know_their_lane_and_batch() -> None:
    engine = engine_of("mlm", dropout=0.1)
    found = list(micro_batches(engine, work_of(engine, "mlm", [2, 3])))
    assert [micro.lane for micro in found] == [2, 3]
    assert [micro.batch.ids for micro in found] == [batch.ids for batch in lane_batches(engine, "mlm")[2:]]
    assert all(micro.stochastic for micro in found)


@pytest.mark.parametrize("onednn", [False, True])
def test_recomputing_the_clean_graph_holds_the_activations_of_one_pass_at_a_time(
    monkeypatch: pytest.MonkeyPatch, onednn: bool
) -> None:
    """Also where a node that the inputs' gradients have no use for holds its activations: oneDNN's for weights."""
    if onednn and products.onednn_product() is None:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "WORTHWHILE", 0.0 if onednn else float("inf"))
    module = tiny_module("vqa", dtype=torch.float32)
    engine = TorchEngine(module, EngineConfig(device="cpu"), OptimizerConfig())
    objective = engine.module.objectives["vqa"]
    batch = tiny_batch(objective, rows=200, dtype=torch.float32)
    work = StepInput(
        1, 0, objective, (batch, batch), (0, 1)
    )  # the first one's gradients are there at the second's peak

    def peak(**settings: Any) -> int:
        config = AdversaryConfig(modality="both", **STRONG, **settings)
        with LiveBytes() as live:
            adversarial_step(engine, work, Adversary(config), 1.0)
        engine.discard()
        return live.peak

    with LiveBytes() as live:
        train_step(engine, work)
    engine.discard()
    one_pass = live.peak
    assert peak(clean_graph="keep") > 1.6 * one_pass
    assert peak(clean_graph="recompute") < 1.4 * one_pass
    assert peak(clean="detached") < 1.4 * one_pass
