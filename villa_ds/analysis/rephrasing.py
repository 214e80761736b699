"""Robustness to rephrased questions: accuracy, and consensus as VQA-Rephrasings measures it (Shah et al., CVPR 2019).

A question of the demo is put in three more ways that ask for the same, so that its answer is the same. The forms are
made from the question alone. They use only words that pre-training and question answering on the demo train (a test
holds them against the sets' texts), so that what is new to a model is the form.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from villa_ds.analysis.intervals import Estimate, estimate
from villa_ds.batch import Sample
from villa_ds.data.collate import collate
from villa_ds.data.convert.scenes import COLOUR_LIST, DIRECTIONS, PLACES, SHAPE_LIST
from villa_ds.data.wordpiece import WordPieces
from villa_ds.objectives.answers import AnswerScoring, score_of_best
from villa_ds.rng import Stream
from villa_ds.train.module import TrainModule

FORMS = 4  # of a question: as it was asked, and three others
ROWS = 64
_COLOUR, _SHAPE = "|".join(COLOUR_LIST), "|".join(SHAPE_LIST)
_NOUN = rf"(?:(?:{_COLOUR}) (?:{_SHAPE}|shape)|{_SHAPE}|shape)"
_PLACE, _BESIDE = "|".join(PLACES), "|".join(DIRECTIONS)

# kind of question, pattern, the other ways to ask; in each line {0}, {1} are the pattern's groups. The benchmark asks
# each kind in one form, the package about its single images in several, some of which are among the other ways.
_WAYS = (
    (
        "existence", rf"(?:is there a|does the image contain a|is a) ({_NOUN})(?: in the image| present)?\?",
        ("is a {0} there?", "there is a {0}?", "the image contains a {0}?"),
    ),
    (
        "absence",
        rf"(?:is there no|is there not a|does the image not contain a|is no) ({_NOUN})(?: in the image| present)?\?",
        ("is no {0} there?", "there is no {0}?", "the image contains no {0}?"),
    ),
    (
        "number", rf"how many ({_NOUN}s) are there\?",
        ("there are how many {0}?", "the image contains how many {0}?", "how many {0} are on the image?"),
    ),
    (
        "colour by place", rf"what color is the ({_PLACE}) shape\?",
        ("the {0} shape is what color?", "what is the color of the {0} shape?", "what color is the shape on the {0}?"),
    ),
    (
        "shape by place", rf"what shape is on the ({_PLACE})\?",
        ("what is on the {0}?", "on the {0} is what shape?", "what is the {0} shape?"),
    ),
    (
        "colour by place of another", rf"what color is the shape ({_BESIDE}) the ({_NOUN})\?",
        (
            "the shape {0} the {1} is what color?", "what is the color of the shape {0} the {1}?",
            "of what color is the shape {0} the {1}?",
        ),
    ),
    (
        "shape by place of another", rf"what is ({_BESIDE}) the ({_NOUN})\?",
        ("{0} the {1} is what?", "what shape is {0} the {1}?", "what is the shape {0} the {1}?"),
    ),
    (
        "colour by shape", rf"what color is the ({_NOUN})\?",
        ("the {0} is what color?", "what is the color of the {0}?", "of what color is the {0}?"),
    ),
    (
        "colour by shape", rf"what is the color of the ({_NOUN})\?",
        ("the color of the {0} is what?", "of what color is the {0}?", "the {0} is what color?"),
    ),
    (
        "shape", r"what shape (?:is in the image|is present|does the image contain)\?",
        ("the image contains what shape?", "what shape is there?", "the shape is what?"),
    ),
    (
        "shape by colour", rf"what is the ((?:{_COLOUR}) shape)\?",
        ("the {0} is what?", "what shape is the {0}?", "what is the shape of the {0}?"),
    ),
    (
        "place", rf"where is the ({_NOUN})\?",
        ("the {0} is where?", "where on the image is the {0}?", "where is the {0} on the image?"),
    ),
)  # fmt: skip
_PATTERNS = tuple((kind, re.compile(pattern), ways) for kind, pattern, ways in _WAYS)


@dataclass(frozen=True, slots=True)
class Rephrased:
    """A question with the other ways to ask it."""

    kind: str
    texts: tuple[str, ...]  # FORMS of them, the question itself first


def rephrase(question: str) -> Rephrased | None:
    """None for a question of no known kind."""
    for kind, pattern, ways in _PATTERNS:
        match = pattern.fullmatch(question)
        if match is not None:
            return Rephrased(kind, (question, *(way.format(*match.groups()) for way in ways)))
    return None


def consensus(right: Sequence[bool], k: int) -> float:
    """CS(k) of one question: the share of the k-sized subsets of its forms that are answered rightly throughout.

    With c of n forms right, C(c, k) / C(n, k) (Shah et al., section 3). k = 1 is the accuracy over all forms.
    """
    return math.comb(sum(right), k) / math.comb(len(right), k)


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a set in all its forms."""

    image: str
    kind: str
    texts: tuple[str, ...]
    samples: tuple[Sample, ...]  # with the same regions and target


@dataclass(frozen=True, slots=True)
class Robustness:
    """What a model makes of rephrased questions."""

    original: Estimate  # accuracy in the set's own form
    others: Estimate  # in the other forms
    consensus: tuple[Estimate, ...]  # CS(1) to CS(FORMS)
    by_kind: Mapping[str, tuple[Estimate, Estimate]]  # accuracy in the own form and in the others


def question_of(text: str, image: str, sample: Sample, word_pieces: WordPieces) -> Question | None:
    """A stored question in all its forms; None if it is of no known kind, or a form has a word that is no word piece.

    A word in several pieces would be new to a model in another way than its form is.
    """
    found = rephrase(text)
    if found is None:
        return None
    encoded = [word_pieces.encode(each) for each in found.texts]
    pieces = [word_pieces.pieces[piece] for piece in itertools.chain(*encoded)]
    if any(piece.startswith("##") or piece == word_pieces.pieces[word_pieces.vocabulary.unk] for piece in pieces):
        return None
    samples = tuple(dataclasses.replace(sample, word_pieces=np.array(each, np.int32)) for each in encoded)
    return Question(image, found.kind, found.texts, samples)


def robustness(module: TrainModule, objective: AnswerScoring, questions: Sequence[Question]) -> Robustness:
    """Ask a model every form of every question. An answer is right if the target gives it a score above 0."""
    samples = [sample for question in questions for sample in question.samples]
    right = np.array(list(_answered(module, objective, samples))).reshape(len(questions), FORMS)
    images = [question.image for question in questions]
    by_kind = {}
    for kind in dict.fromkeys(way[0] for way in _WAYS):
        rows = [place for place, question in enumerate(questions) if question.kind == kind]
        if rows:
            by_kind[kind] = _original_and_others(right[rows], [images[row] for row in rows])
    return Robustness(
        *_original_and_others(right, images),
        tuple(estimate([consensus(row, k) for row in right.tolist()], images) for k in range(1, FORMS + 1)),
        by_kind,
    )


def _original_and_others(
    right: np.ndarray[tuple[int, int], np.dtype[np.bool_]], images: Sequence[str]
) -> tuple[Estimate, Estimate]:
    return estimate(right[:, 0], images), estimate(right[:, 1:].mean(1), images)


@torch.no_grad()
def _answered(module: TrainModule, objective: AnswerScoring, samples: Sequence[Sample]) -> Iterator[bool]:
    """Whether each sample is answered rightly."""
    device = module.backbone.word_embedding.device
    for start in range(0, len(samples), ROWS):
        examples = [objective.prepare(each, Stream("rephrasing")) for each in samples[start : start + ROWS]]
        batch = collate(examples, objective.reads).to(device)
        yield from (score_of_best(module(batch, objective.name), batch) > 0).tolist()
