"""Rephrased questions: forms of known words that ask for the same, and consensus as the paper defines it."""

import itertools
from collections import Counter

import easy_vqa
import numpy as np
import pytest
import torch

from tests.tiny import VOCABULARY, tiny_module, tiny_objectives, tiny_sample
from villa_ds.analysis.rephrasing import FORMS, Question, consensus, question_of, rephrase, robustness
from villa_ds.batch import Sample
from villa_ds.data.convert.easy_vqa import read_package, statement_rows
from villa_ds.data.convert.scene_texts import questions, statements
from villa_ds.data.convert.scenes import COLOUR_LIST, SHAPE_LIST, Draw, Scene, Thing, draw_places
from villa_ds.data.wordpiece import WordPieces
from villa_ds.objectives.answers import AnswerScoring
from villa_ds.rng import Stream


def scenes(count: int) -> list[Scene]:
    found: list[Scene] = []
    for number in range(count):
        draw = Draw(Stream("test", number))
        places = draw_places(draw, (2, 3, 4))
        things = [Thing(draw.one(COLOUR_LIST), draw.one(SHAPE_LIST)) if place in places else None for place in range(4)]
        found.append((things[0], things[1], things[2], things[3]))
    return found


def words_of(text: str) -> set[str]:
    return set(text.replace("?", " ?").split())


def test_every_question_of_the_benchmark_has_other_forms_of_words_that_are_trained() -> None:
    """What pre-training and question answering say holds every word of every form."""
    trained: set[str] = set()
    asked: list[str] = []
    for number, scene in enumerate(scenes(400)):
        draw = Draw(Stream("texts", number))
        said = [row.text for row in statements(scene, draw, 10)]
        asked += [row.text for row in questions(scene, draw, 8)]
        trained |= set().union(*map(words_of, said + asked[-8:]))
    kinds = set()
    for question in asked:
        found = rephrase(question)
        assert found is not None, question
        kinds.add(found.kind)
        assert found.texts[0] == question
        assert len(set(found.texts)) == FORMS
        for text in found.texts:
            assert words_of(text) <= trained, text
    assert len(kinds) == 10


def test_so_has_every_question_of_the_package_about_its_single_images() -> None:
    asked = easy_vqa.get_test_questions()[0]
    forms = [rephrase(question) for question in asked]
    photos = [photo for photo in read_package(200) if photo.split == "train"]
    trained = set().union(*(words_of(text) for photo in photos for _, text, _ in statement_rows(photo)))
    trained |= set().union(*(words_of(text) for photo in photos for _, text, _ in photo.questions))
    kinds: Counter[str] = Counter()
    for question, found in zip(asked, forms, strict=True):
        assert found is not None, question
        kinds[found.kind] += 1
        assert len({question, *found.texts}) == FORMS
        assert set().union(*map(words_of, found.texts)) <= trained, found.texts
        negative = bool({"no", "not"} & words_of(question))
        assert {bool({"no", "not"} & words_of(text)) for text in found.texts} == {negative}
        assert (found.kind == "absence") == negative
    assert set(kinds) == {"existence", "absence", "colour by shape", "shape", "shape by colour"}


@pytest.mark.parametrize(
    ("question", "kind", "others"),
    [
        ("does the image not contain a circle?", "absence",
         ("is no circle there?", "there is no circle?", "the image contains no circle?")),
        ("is there no red shape?", "absence",
         ("is no red shape there?", "there is no red shape?", "the image contains no red shape?")),
        ("how many circles are there?", "number",
         ("there are how many circles?", "the image contains how many circles?", "how many circles are on the image?")),
        ("what color is the top left shape?", "colour by place",
         ("the top left shape is what color?", "what is the color of the top left shape?",
          "what color is the shape on the top left?")),
        ("what color is the shape left of the red circle?", "colour by place of another",
         ("the shape left of the red circle is what color?", "what is the color of the shape left of the red circle?",
          "of what color is the shape left of the red circle?")),
        ("what is above the circle?", "shape by place of another",
         ("above the circle is what?", "what shape is above the circle?", "what is the shape above the circle?")),
    ],
)  # fmt: skip
def test_forms(question: str, kind: str, others: tuple[str, ...]) -> None:
    found = rephrase(question)
    assert found is not None
    assert (found.kind, found.texts) == (kind, (question, *others))


@pytest.mark.parametrize("question", ["is the circle red?", "where is the dog?", "what color is the shape", ""])
def test_other_questions_are_left_alone(question: str) -> None:
    assert rephrase(question) is None


def test_a_form_with_an_unknown_word_rules_the_question_out() -> None:
    texts = ["where is the circle?", "the circle is where?", "where on the image is the circle?"]
    sample = tiny_sample(0)
    whole = WordPieces.train([*texts, *texts], 200)
    found = question_of(texts[0], "picture", sample, whole)
    assert found is not None
    assert [whole.decode(each.word_pieces.tolist()) for each in found.samples] == list(found.texts)
    assert all(each.regions is sample.regions and each.target is sample.target for each in found.samples)
    split = WordPieces.train([texts[0], texts[0], *texts[1:2]], 200)  # "image" has only its letters, if these
    assert question_of(texts[0], "picture", sample, split) is None


def test_consensus_is_the_share_of_subsets_that_are_right_throughout() -> None:
    for right in itertools.product([False, True], repeat=FORMS):
        for k in range(1, FORMS + 1):
            subsets = list(itertools.combinations(right, k))
            assert consensus(right, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))
    assert [consensus([True, True, True, False], k) for k in (1, 2, 3, 4)] == [0.75, 0.5, 0.25, 0.0]


def asked(answers: list[list[int]], wanted: list[int], kinds: list[str]) -> list[Question]:
    """Questions whose forms are single words; the rigged head answers the number of a text's last word."""
    found = []
    for number, (forms, label) in enumerate(zip(answers, wanted, strict=True)):
        samples = tuple(
            Sample("s", np.array([10 + form], np.int32), tiny_sample(0).regions, {"labels": [label], "scores": [1.0]})
            for form in forms
        )
        found.append(Question(f"image{number // 2}", kinds[number], tuple("abcd"), samples))
    return found


def test_robustness_of_a_model_whose_answers_are_known() -> None:
    module = tiny_module("vqa")
    (objective,) = tiny_objectives("vqa")
    assert isinstance(objective, AnswerScoring)

    class Rigged(torch.nn.Module):
        """Answers the number of the first word piece, less 10."""

        def forward(self, pooled: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(self.words - 10, 5).double()

    rigged = Rigged()
    module.vqa_output = rigged  # type: ignore[assignment]
    module.register_forward_pre_hook(lambda _, inputs: setattr(rigged, "words", inputs[0].input_ids[:, 1]))
    answers = [[1, 1, 1, 1], [2, 2, 0, 0], [0, 3, 3, 3], [4, 0, 0, 0]]
    found = robustness(module, objective, asked(answers, [1, 2, 3, 3], ["number", "place", "place", "absence"]))
    assert found.original.mean == 0.5
    assert found.others.mean == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    assert [each.mean for each in found.consensus] == pytest.approx(
        [(1 + 0.5 + 0.75) / 4, (1 + 1 / 6 + 0.5) / 4, (1 + 0.25) / 4, 1 / 4]
    )
    assert list(found.by_kind) == ["absence", "number", "place"]
    assert [each.mean for each in found.by_kind["place"]] == [0.5, pytest.approx(2 / 3)]
    assert VOCABULARY.size > 14
