"""Downstream objectives beside VQA: what they prepare, refuse, measure and predict."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.batches import pack
from tests.tiny import MANIFEST, VOCABULARY, tiny_module
from tests.unit.pairs import batch_of_lengths, regions_of, sample_of
from villa_ds.batch import Batch, Encoded, ImageSpan, LossOutput, Reads, Regions, Sample
from villa_ds.config_objectives import Nlvr2Config, ObjectivesConfig, RefexpConfig, RetrievalConfig, VcrConfig
from villa_ds.data.collate import collate
from villa_ds.errors import ConfigError, DataError
from villa_ds.models.uniter import UniterBackbone
from villa_ds.models.weights import load_reference, to_reference
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.objectives.refexp import overlaps
from villa_ds.rng import Stream
from villa_ds.train.module import TrainModule

BARE = replace(MANIFEST, answers=())


class Fixed(nn.Module):
    """A head whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Tensor) -> Tensor:
        return self.output


def objective_of(name: str, **settings: object) -> Objective:
    return build_objective(name, ObjectivesConfig(**settings), BARE)  # type: ignore[arg-type]


def output_of(objective: Objective, logits: Tensor, **targets: Tensor) -> tuple[LossOutput, Batch, dict[str, float]]:
    """Output for known logits, its batch, and its sums and metrics, divided."""
    batch = replace(batch_of_lengths(), targets=targets)
    output = objective.loss(Fixed(logits), Encoded(torch.zeros(1), torch.zeros(1)), batch)
    sums = {**output.sums, **objective.metrics(output, batch)}
    assert not any(value.requires_grad for pair in sums.values() for value in pair)
    return output, batch, {name: float(value / count) for name, (value, count) in sums.items()}


def test_entailment_target_and_answer_list() -> None:
    objective = objective_of("ve")
    example = objective.prepare(sample_of(target={"labels": [2], "scores": [1.0]}), Stream("prepare", 0))
    np.testing.assert_array_equal(example.targets["scores"], np.array([[0, 0, 1]], dtype=np.float32))
    assert example.input_ids.tolist() == [VOCABULARY.cls, 11, 12, 13, VOCABULARY.sep]
    with pytest.raises(DataError, match=r"label 3 is not in 0\.\.2; the classes are contradiction, entailment, neutr"):
        objective.prepare(sample_of(target={"labels": [3], "scores": [1.0]}), Stream("prepare", 0))
    with pytest.raises(ConfigError, match=r"'ve' has the answers contradiction.*; the list of tiny is another"):
        build_objective("ve", ObjectivesConfig(), MANIFEST)


def test_entailment_loss_accuracy_and_prediction() -> None:
    objective = objective_of("ve")
    logits, scores = torch.tensor([[3.0, -1, 0], [0.1, 0.3, 0.2]]), torch.tensor([[1.0, 0, 0], [0, 0.2, 0.8]])
    output, batch, sums = output_of(objective, logits, scores=scores)
    terms = -(scores * F.logsigmoid(logits) + (1 - scores) * F.logsigmoid(-logits))
    torch.testing.assert_close(output.loss, terms.sum(1).mean())
    assert sums == {"loss": pytest.approx(float(output.loss)), "accuracy": pytest.approx(0.6)}
    first, second = objective.predictions(output, batch)
    assert first == {"answer": "contradiction", "label": 0, "score": 1.0}
    assert (second["answer"], second["score"]) == ("entailment", pytest.approx(0.2))
    assert objective.class_targets(batch).tolist() == [0, 2]  # type: ignore[union-attr]


def test_entailment_takes_no_learning_rate_of_its_own() -> None:
    assert tiny_module("vqa").downstream_heads == ["vqa_output"]
    module = TrainModule(tiny_module().backbone, [objective_of("ve")])
    assert module.downstream_heads == []
    assert module.get_parameter("vqa_output.3.bias").shape == (3,)


def test_entailment_and_vqa_do_not_share_a_head() -> None:
    objective, batch = objective_of("ve"), replace(batch_of_lengths(), targets={"scores": torch.zeros(3, 3)})
    with pytest.raises(ConfigError, match="'ve' has 3 answers, but another one with 5 built the head vqa_output"):
        objective.loss(Fixed(torch.zeros(3, 5)), Encoded(torch.zeros(1), torch.zeros(1)), batch)


def test_regions_are_left_as_they_are() -> None:
    image = regions_of(3)
    example = objective_of("ve").prepare(sample_of(image=image), Stream("prepare", 0))
    assert example.features is image.features


def test_divergence_is_summed_over_classes() -> None:
    first, second = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = first.softmax(-1), second.softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean()
    torch.testing.assert_close(objective_of("ve").divergence(first, second), expected)


def vcr_sample(**changes: object) -> Sample:
    target: dict[str, object] = {
        "answers": [[20], [21, 22], [23], [24]],
        "rationales": [[30], [31], [32, 33, 34], [35]],
        "answer": 1,
        "rationale": 2,
    }
    return sample_of(pieces=(11, 12), target=target | changes)


def test_vcr_rows() -> None:
    example = objective_of("vcr").prepare(vcr_sample(), Stream("prepare", 0))
    assert [row.input_ids.tolist() for row in example.rows] == [
        [2, 11, 12, 3, 20, 3],
        [2, 11, 12, 3, 21, 22, 3],
        [2, 11, 12, 3, 23, 3],
        [2, 11, 12, 3, 24, 3],
        [2, 11, 12, 3, 21, 22, 3, 30, 3],
        [2, 11, 12, 3, 21, 22, 3, 31, 3],
        [2, 11, 12, 3, 21, 22, 3, 32, 33, 34, 3],
        [2, 11, 12, 3, 21, 22, 3, 35, 3],
    ]
    assert example.rows[1].token_types.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert example.rows[4].token_types.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert example.targets["correct"].tolist() == [1, 2]
    batch = collate([example, example], Reads.POOLED)
    assert (len(batch), batch.ids) == (16, ("pair", "pair"))
    assert batch.targets["correct"].tolist() == [1, 2, 1, 2]
    assert batch.text_lengths[8:].tolist() == [6, 7, 6, 6, 9, 9, 11, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": -1}, r"the right answer is -1, not in 0\.\.3"),
        ({"rationale": None}, r"the right rationale is None, not in 0\.\.3"),
        ({"answers": [[20], [21], [22]]}, "3 answers to choose from, expected 4"),
        ({"rationales": [[30], [31], [], [33]]}, r"rationale \[\] is not word pieces in 0\.\.49"),
        ({"answers": [[20], [21], [50], [22]]}, r"answer \[50\] is not word pieces in 0\.\.49"),
    ],
)
def test_vcr_refuses_what_cannot_be_chosen_from(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"sample 'pair': {message}"):
        objective_of("vcr").prepare(vcr_sample(**changes), Stream("prepare", 0))


def rows_of(scores: list[list[float]]) -> Tensor:
    """[B, 2] logits whose difference is the score."""
    right = torch.tensor(scores, dtype=torch.float32).flatten()
    return torch.stack([torch.zeros_like(right), right], dim=1)


def test_vcr_loss_metrics_and_predictions_by_question() -> None:
    objective = objective_of("vcr")
    # two samples, each with an answer and a rationale to choose
    logits = rows_of([[3, 1, 0, 0], [0, 0, 2, 1], [0, 5, 0, 0], [1, 0, 0, 0]])
    output, batch, sums = output_of(objective, logits, correct=torch.tensor([0, 2, 1, 3]))
    right = torch.eye(4)[batch.targets["correct"]].flatten().long()
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, right))
    assert sums.pop("loss") == pytest.approx(float(output.loss))
    assert sums == {"answer_accuracy": 1.0, "rationale_accuracy": 0.5, "accuracy": 0.5}
    first, second = objective.predictions(output, batch)
    assert first == {"answer": 0, "answer_scores": [3, 1, 0, 0], "rationale": 2, "rationale_scores": [0, 0, 2, 1]}
    assert (second["answer"], second["rationale"]) == (1, 0)
    assert objective.class_targets(batch).tolist() == [0, 2, 1, 3]  # type: ignore[union-attr]
    assert objective.num_classes == 4

    alone = objective_of("vcr", vcr=VcrConfig(questions="qar"))
    _, _, sums = output_of(alone, logits, correct=torch.tensor([0, 2, 1, 3]))
    assert (set(sums), sums["rationale_accuracy"]) == ({"loss", "rationale_accuracy"}, 0.75)


def test_vcr_divergence_is_averaged_over_classes() -> None:
    first, second = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = first.softmax(-1), second.softmax(-1)
    torch.testing.assert_close(objective_of("vcr").divergence(first, second), ((p - q) * (p / q).log()).mean())


def test_token_types_that_the_model_lacks() -> None:
    with pytest.raises(ConfigError, match=r"type_vocab_size: 2 does not do: objective 'vcr' has 4 token types"):
        objective_of("vcr").build_head(tiny_module().backbone)


def two_images(left: int = 2, right: int = 3) -> Regions:
    regions = regions_of(left + right)
    return replace(regions, images=(ImageSpan("left", 0, left), ImageSpan("right", left, left + right)))


def test_nlvr2_forms() -> None:
    sample = sample_of(image=two_images(), target={"label": 1})
    for form in ("paired", "paired-attn"):
        example = objective_of("nlvr2", nlvr2=Nlvr2Config(form=form)).prepare(sample, Stream("prepare", 0))
        left, right = example.rows
        np.testing.assert_array_equal(left.features, sample.regions.features[:2])
        np.testing.assert_array_equal(right.features, sample.regions.features[2:])
        np.testing.assert_array_equal(right.boxes, sample.regions.boxes[2:])
        assert (left.region_types.tolist(), right.region_types.tolist()) == ([1, 1], [2, 2, 2])
        assert left.input_ids.tolist() == right.input_ids.tolist()
    objective = objective_of("nlvr2", nlvr2=Nlvr2Config(form="triplet"))
    (row,) = objective.prepare(sample, Stream("prepare", 0)).rows
    np.testing.assert_array_equal(row.features, sample.regions.features)
    assert row.region_types.tolist() == [1, 1, 2, 2, 2]
    assert row.targets["label"].tolist() == [1]
    assert objective_of("nlvr2").reads is Reads.ALL


def test_nlvr2_refuses() -> None:
    with pytest.raises(DataError, match="sample 'pair': label None is neither 0"):
        objective_of("nlvr2").prepare(sample_of(image=two_images()), Stream("prepare", 0))
    with pytest.raises(DataError, match="sample 'pair': 1 images, expected a left and a right one"):
        objective_of("nlvr2").prepare(sample_of(target={"label": 0}), Stream("prepare", 0))


def test_nlvr2_loss_accuracy_and_prediction() -> None:
    objective = objective_of("nlvr2", nlvr2=Nlvr2Config(form="triplet"))
    logits, label = torch.tensor([[1.0, 0], [0, 2], [0, 1]]), torch.tensor([0, 1, 0])
    output, batch, sums = output_of(objective, logits, label=label)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, label))
    assert sums == {"loss": pytest.approx(float(output.loss)), "accuracy": pytest.approx(2 / 3)}
    rows = objective.predictions(output, batch)
    assert [(row["answer"], row["label"]) for row in rows] == [(False, 0), (True, 1), (True, 0)]
    assert rows[1]["true_probability"] == pytest.approx(float(logits[1].softmax(0)[1]))
    assert torch.equal(objective.class_targets(batch), label)  # type: ignore[arg-type]


def test_paired_attention_is_xavier_and_the_rest_is_bert_s() -> None:
    sizes = replace(tiny_module().backbone.sizes, type_vocab_size=3, hidden_size=64, initializer_range=0.001)
    torch.manual_seed(0)
    head = objective_of("nlvr2").build_head(UniterBackbone(sizes))
    spread = {name: float(value.detach().std()) for name, value in head.named_parameters() if value.dim() == 2}
    packed = {name for name in spread if "in_proj" in name}
    assert len(packed) == 2
    for name in packed:  # uniform within sqrt(6 / (H + 3 H))
        assert spread[name] == pytest.approx((6 / 256) ** 0.5 / 3**0.5, rel=0.05)
    assert all(spread[name] == pytest.approx(0.001, rel=0.3) for name in set(spread) - packed)


def test_paired_attention_heeds_no_padding() -> None:
    sizes = replace(tiny_module().backbone.sizes, type_vocab_size=3)
    torch.manual_seed(0)
    head = objective_of("nlvr2").build_head(UniterBackbone(sizes))
    states, valid = torch.randn(4, 7, 16), torch.arange(7) < torch.tensor([[7], [4], [5], [6]])
    moved = torch.where(valid[..., None], states, states + 9)
    torch.testing.assert_close(head(moved, valid), head(states, valid))
    swapped = head(states[[1, 0, 3, 2]], valid[[1, 0, 3, 2]])
    assert not torch.allclose(swapped, head(states, valid))


def refexp_batch(targets: dict[str, Tensor]) -> Batch:
    """Three rows of 2, 5 and 4 regions, all read."""
    batch = replace(batch_of_lengths(), targets=targets)
    slots, packed = pack(torch.cat([torch.zeros_like(batch.text_valid), batch.region_valid], dim=1))
    return replace(batch, read_slots=slots, read_packed=packed, reads=Reads.SLOTS)


SCORES = torch.tensor([0.5, 1.5, -1, 2, 0, 1, 3, 0.1, 0.4, 0.3, 0.2])


def refexp_output(targets: dict[str, Tensor], **settings: object) -> tuple[Objective, LossOutput, Batch]:
    objective = objective_of("refexp", refexp=RefexpConfig(**settings))  # type: ignore[arg-type]
    batch = refexp_batch(targets)
    return objective, objective.loss(Fixed(SCORES[:, None]), Encoded(torch.zeros(1), None), batch), batch


def test_refexp_reads_every_region_and_draws_the_other() -> None:
    sample = sample_of(image=regions_of(6), target={"region": 2})
    drawn = []
    for hard_ratio in (0.0, 1.0):
        objective = objective_of("refexp", refexp=RefexpConfig(loss="rank", hard_ratio=hard_ratio))
        examples = [objective.prepare(sample, Stream("prepare", seed)) for seed in range(200)]
        drawn.append([int(example.targets["negative"][0]) for example in examples])
    assert set(drawn[0]) == {0, 1, 3, 4, 5}
    assert set(drawn[1]) == {-1}
    assert examples[0].read_regions is not None
    assert examples[0].read_regions.tolist() == list(range(6))
    assert examples[0].targets["overlap"].tolist() == [0, 0, 1, 0, 0, 0]
    lone = objective_of("refexp").prepare(sample_of(image=regions_of(1), target={"region": 0}), Stream("p", 0))
    assert lone.targets["negative"].tolist() == [0]
    for region in (6, -1, None):
        with pytest.raises(DataError, match=rf"the region meant is {region}, not in 0\.\.5"):
            objective.prepare(sample_of(image=regions_of(6), target={"region": region}), Stream("p", 0))


def test_refexp_classification() -> None:
    meant = torch.tensor([1, 2, 0])
    overlap = F.one_hot(torch.tensor([1, 3, 8]), 11).sum(0).float()
    objective, output, batch = refexp_output({"region": meant, "overlap": overlap})
    rows = [SCORES[:2], SCORES[2:7], SCORES[7:]]
    expected = [-row.log_softmax(0)[place] for row, place in zip(rows, meant.tolist(), strict=True)]
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())
    assert output.logits[0].tolist() == [0.5, 1.5, -1e4, -1e4, -1e4]
    hits, count = objective.metrics(output, batch)["accuracy"]
    assert (float(hits), float(count)) == (2.0, 3.0)  # best are 1, 4 and 1 of their rows
    assert objective.predictions(output, batch)[1] == {"region": 4, "overlap": 0.0, "meant": 2}
    assert objective.class_targets(batch) is None


def test_refexp_ranking() -> None:
    targets = {"region": torch.tensor([1, 2, 0]), "negative": torch.tensor([0, -1, 3])}
    _, output, _ = refexp_output(targets, loss="rank", margin=0.3)
    pairs = [(1.5, 0.5), (0.0, 3.0), (0.1, 0.2)]  # the hardest of the second row is its last region
    terms = [
        max(0.0, 0.3 + torch.sigmoid(torch.tensor(b)).item() - torch.sigmoid(torch.tensor(a)).item()) for a, b in pairs
    ]
    assert output.elements.tolist() == pytest.approx(terms)
    assert float(output.loss) == pytest.approx(sum(terms) / 3)


def test_refexp_boxes() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [5, 0, 10, 10], [20, 20, 5, 5], [0, 0, 10, 4]])
    np.testing.assert_allclose(overlaps(boxes, [0, 0, 10, 10]), [1, 50 / 150, 0, 0.4])
    normalised = np.zeros((4, 7), np.float32)
    normalised[:, [0, 1, 4, 5]] = boxes / [100, 50, 100, 50]
    image = replace(regions_of(4), boxes=normalised)
    target: dict[str, object] = {"box": [4, 0, 10, 10], "image_size": [100, 50]}
    example = objective_of("refexp").prepare(sample_of(image=image, target=target), Stream("p", 0))
    assert example.targets["region"].tolist() == [1]  # detected: the one that overlaps most
    np.testing.assert_allclose(example.targets["overlap"], [60 / 140, 90 / 110, 0, 24 / 116], rtol=1e-5)
    with pytest.raises(DataError, match="a box needs image_size"):
        objective_of("refexp").prepare(sample_of(image=image, target={"box": [4, 0, 10, 10]}), Stream("p", 0))


def test_retrieval_rows() -> None:
    objective = objective_of("retrieval", retrieval=RetrievalConfig(max_text_length=3))
    own, other = regions_of(2), regions_of(3, "other")
    sample = replace(sample_of(image=own, negative=other), negative_texts=[[30, 31], [32], [33, 34, 35, 36]])
    drawn = set()
    for seed in range(40):
        pair, image, text = objective.prepare(sample, Stream("prepare", seed)).rows
        assert pair.input_ids.tolist() == image.input_ids.tolist() == [2, 11, 12, 13, 3]
        assert (pair.features is own.features, image.features is other.features) == (True, True)
        assert text.features is own.features
        drawn.add(tuple(text.input_ids.tolist()))
    assert drawn == {(2, 30, 31, 3), (2, 32, 3)}  # the third is too long
    long = replace(sample, negative_texts=[[33, 34, 35, 36]])
    assert objective.prepare(long, Stream("p", 0)).rows[2].input_ids.tolist() == [2, 33, 34, 35, 3]
    with pytest.raises(DataError, match="no other image with a text"):
        objective.prepare(sample_of(), Stream("p", 0))


def test_retrieval_loss_accuracy_and_divergence() -> None:
    objective = objective_of("retrieval")
    logits = torch.tensor([[1.0], [0.5], [-3], [0.0], [0.2], [-1]])
    batch = replace(batch_of_lengths((3,) * 6, (2,) * 6), ids=("a", "b"))
    output = objective.loss(Fixed(logits), Encoded(torch.zeros(1), torch.zeros(1)), batch)
    chance = logits.sigmoid().view(2, 3)
    terms = (0.2 + chance[:, 1:] - chance[:, :1]).clamp(min=0)
    torch.testing.assert_close(output.elements, terms)
    torch.testing.assert_close(output.loss, terms.mean())
    assert objective.metrics(output, batch)["accuracy"][0] == 1  # the second pair's image is outdone
    assert objective.predictions(output, batch)[0] == {"score": 1.0, "mismatched_scores": [0.5, -3.0]}
    p, q = logits.sigmoid(), (2 * logits + 1).sigmoid()
    expected = (p - q) * (p / q).log() + (q - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(objective.divergence(logits, 2 * logits + 1), expected.mean())


def test_retrieval_starts_from_the_matching_head() -> None:
    source = to_reference(tiny_module("itm", seed=3).state_dict())
    module = TrainModule(tiny_module().backbone, [objective_of("retrieval")])
    adaptations = [module.objectives["retrieval"].adaptation]
    report = load_reference(module, source, adaptations)
    assert report.missing == report.unexpected == ()
    written = to_reference(module.state_dict())
    assert {name for name in written if not name.startswith("uniter.")} == {
        f"{head}_output.{part}" for head in ("itm", "rank") for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        torch.testing.assert_close(written[f"rank_output.{part}"], source[f"itm_output.{part}"][1:].to(torch.float32))
    tuned = {name: value + 1 if name.startswith("rank") else value for name, value in written.items()}
    load_reference(module, tuned, adaptations)  # a head that was fine-tuned is not overwritten
    torch.testing.assert_close(to_reference(module.state_dict()), tuned)


def test_heads_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"objectives itm, retrieval have two heads of one name, itm_output"):
        TrainModule(tiny_module().backbone, [objective_of("itm"), objective_of("retrieval")])


@pytest.mark.parametrize(
    ("name", "settings", "rows"),
    [
        ("ve", {}, 1),
        ("refexp", {}, 1),
        ("retrieval", {}, 3),
        ("vcr", {}, 8),
        ("vcr", {"vcr": VcrConfig(questions="qa")}, 4),
        ("nlvr2", {}, 2),
        ("nlvr2", {"nlvr2": Nlvr2Config(form="triplet")}, 1),
    ],
)
def test_rows_are_as_many_as_declared(name: str, settings: dict[str, object], rows: int) -> None:
    objective = objective_of(name, **settings)
    target = dict(vcr_sample().target) | {"label": 1, "region": 0, "labels": [0], "scores": [1.0]}
    sample = sample_of(image=two_images(), target=target, negative=regions_of(3, "other"))
    example = objective.prepare(replace(sample, negative_texts=[[20]]), Stream("prepare", 0))
    assert len(example.rows) == objective.rows == rows
