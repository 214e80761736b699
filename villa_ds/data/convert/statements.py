"""True statements about an easy-VQA image, derived from its questions and answers alone."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from villa_ds.errors import DataError
from villa_ds.rng import Stream

COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})

# {c} colour, {s} shape, {v} an absent colour or shape. Each line is true whenever its facts are.
_OF_BOTH = (
    "there is a {c} {s} in the image",
    "a {c} {s} is present",
    "the {s} is {c}",
    "the image contains a {c} {s}",
    "the picture shows a {c} {s}",
    "the {c} shape is a {s}",
    "the color of the {s} is {c}",
    "one can see a {s} that is {c}",
)
_OF_COLOUR = (
    "there is a {c} shape in the image",
    "the shape is {c}",
    "the color of the shape is {c}",
    "the image contains something {c}",
    "a {c} shape is present",
)
_OF_SHAPE = (
    "there is a {s} in the image",
    "the shape is a {s}",
    "the image contains a {s}",
    "the picture shows a {s}",
    "a {s} is present",
)
_OF_ABSENT_COLOUR = (
    "there is no {v} shape in the image",
    "the image does not contain a {v} shape",
    "no {v} shape is present",
    "the shape is not {v}",
    "nothing in the image is {v}",
)
_OF_ABSENT_SHAPE = (
    "there is no {v} in the image",
    "the image does not contain a {v}",
    "no {v} is present",
    "the shape is not a {v}",
)
_OF_CONTRAST = (
    "the {s} is {c} and not {v}",
    "the image contains a {c} {s} but no {v} shape",
    "there is a {c} {s} and nothing {v}",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the answers tell of an image, which shows one shape of one colour."""

    colour: str | None
    shape: str | None
    absent_colours: tuple[str, ...]  # sorted
    absent_shapes: tuple[str, ...]  # sorted


def facts_of(questions: Iterable[tuple[str, str]]) -> Facts:
    """Facts of one image from its (question, answer) pairs.

    "is no red shape present?" asks for absence: "no" says that there is one. "what color is the circle?" presupposes
    a circle. DataError for a question of another kind and for answers that contradict each other.
    """
    present: set[str] = set()
    absent: set[str] = set()
    for question, answer in questions:
        words = set(re.findall(r"[a-z]+", question))
        named = words & (COLOURS | SHAPES)
        if answer in COLOURS | SHAPES:
            present |= named | {answer}
        elif answer in ("yes", "no") and len(named) == 1:
            asks_absence = bool(words & {"no", "not"})
            (present if (answer == "yes") != asks_absence else absent).update(named)
        else:
            raise DataError(f"easy_vqa: question {question!r} with answer {answer!r} is of no known kind")
    colours, shapes = present & COLOURS, present & SHAPES
    if present & absent or len(colours) > 1 or len(shapes) > 1:
        raise DataError(f"easy_vqa: the answers on an image say both {sorted(present)} and not {sorted(absent)}")
    return Facts(
        colour=next(iter(colours), None),
        shape=next(iter(shapes), None),
        absent_colours=tuple(sorted(absent & COLOURS)),
        absent_shapes=tuple(sorted(absent & SHAPES)),
    )


def statements_of(facts: Facts, stream: Stream) -> list[str]:
    """Up to nine different statements, most of them positive; templates and absent values are drawn from `stream`.

    Positive ones prevail because only they tell an image from most others, which image-text matching learns from.
    """
    values = {"c": facts.colour or "", "s": facts.shape or ""}
    absent_colour = _drawn(facts.absent_colours, 1, stream)
    absent_shape = _drawn(facts.absent_shapes, 1, stream)
    chosen: list[tuple[str, str]] = []  # (template, absent value)
    if facts.colour and facts.shape:
        chosen += [(template, "") for template in _drawn(_OF_BOTH, 4, stream)]
        chosen += [(_drawn(_OF_CONTRAST, 1, stream)[0], value) for value in absent_colour]
    if facts.colour:
        chosen += [(template, "") for template in _drawn(_OF_COLOUR, 1, stream)]
    if facts.shape:
        chosen += [(template, "") for template in _drawn(_OF_SHAPE, 1, stream)]
    chosen += [(_drawn(_OF_ABSENT_COLOUR, 1, stream)[0], value) for value in absent_colour]
    chosen += [(_drawn(_OF_ABSENT_SHAPE, 1, stream)[0], value) for value in absent_shape]
    return list(dict.fromkeys(template.format(**values, v=value) for template, value in chosen))


def _drawn(values: Sequence[str], count: int, stream: Stream) -> list[str]:
    """`count` different values (all, if there are fewer), in drawn order."""
    return [values[place] for place in stream.permutation(len(values))[:count]]
