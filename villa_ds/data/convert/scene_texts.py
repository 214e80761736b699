"""What the demo benchmark says and asks of scenes: for each task texts with their targets, all from templates.

A target holds words (`VCR`'s choices) where the shards hold word pieces. Truth is decided by the facts alone.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from villa_ds.data.convert.scenes import (
    COLOUR_LIST,
    DIRECTIONS,
    HALVES,
    NUMBERS,
    PAIRS,
    PLACES,
    SHAPE_LIST,
    Draw,
    Kind,
    Scene,
    Thing,
    filled,
    kind_of,
    kinds_of,
    neighbour,
    neighbours,
)

ANSWERS = ("yes", "no", *NUMBERS, *COLOUR_LIST, *SHAPE_LIST, *PLACES)
RELATIONS = ("contradiction", "entailment", "neutral")  # the releases' order
CONTRADICTION, ENTAILMENT, NEUTRAL = range(3)
COMMON = ("their color", "their shape", "their color and their shape", "nothing")
MENTIONS = tuple(f"[object{number}]" for number in range(1, len(PLACES) + 1))  # word pieces beyond the vocabulary


@dataclass(frozen=True, slots=True)
class SceneText:
    """A text and what is right about it."""

    text: str
    target: Mapping[str, object] = field(default_factory=dict)


def a(kind: Kind) -> str:
    """Such as "a red circle"."""
    return f"a {kind.noun}"


# Pre-training ---------------------------------------------------------------------------------------------------------


def statements(scene: Scene, draw: Draw, count: int) -> list[SceneText]:
    """Up to `count` different true statements."""
    makers = [_of_place] * 4 + [_of_unique] * 3 + [_of_relation] * 3 + [_of_count, _of_count, _of_absence, _caption]
    texts = [text for _ in range(count) if (text := draw.one(makers)(scene, draw)) is not None]
    return [SceneText(text) for text in dict.fromkeys(texts)]


def _of_place(scene: Scene, draw: Draw) -> str | None:
    place, thing = draw.one(filled(scene))
    where = PLACES[place]
    return draw.one(
        [
            f"the {where} shape is {thing.colour}",
            f"the {where} shape is a {thing.shape}",
            f"the {where} shape is a {thing.colour} {thing.shape}",
            f"there is a {thing.colour} {thing.shape} on the {where}",
            f"the {thing.shape} on the {where} is {thing.colour}",
        ]
    )


def _of_unique(scene: Scene, draw: Draw) -> str | None:
    place, thing = draw.one(filled(scene))
    kind = draw.one(kinds_of(thing))
    if kind.only_place(scene) is None or draw.below(4) == 0:
        return draw.one([f"there is {a(kind)}", f"the image contains {a(kind)}"])
    if kind.colour is None and draw.below(2):
        return f"the {kind.noun} is {thing.colour}"
    if kind.shape is None and draw.below(2):
        return f"the {kind.noun} is a {thing.shape}"
    return f"the {kind.noun} is on the {PLACES[place]}"


def _of_relation(scene: Scene, draw: Draw) -> str | None:
    found = neighbours(scene)
    if not found:
        return None
    place, direction, other = draw.one(found)
    thing, base = scene[place], scene[other]
    if thing is None or base is None:
        return None
    kind = draw.one(kinds_of(base))
    if kind.only_place(scene) is None:
        return f"{a(kind_of(thing))} is {direction} {a(kind_of(base))}"
    return draw.one(
        [
            f"the shape {direction} the {kind.noun} is {thing.colour}",
            f"the shape {direction} the {kind.noun} is a {thing.shape}",
            f"{a(kind_of(thing))} is {direction} the {kind.noun}",
        ]
    )


def _of_count(scene: Scene, draw: Draw) -> str | None:
    kind = draw.of_counts([Kind(), *HALVES], lambda kind: kind.count(scene))
    return f"there are {NUMBERS[kind.count(scene)]} {kind.noun}s"


def _of_absence(scene: Scene, draw: Draw) -> str | None:
    absent = [kind for kind in draw.one((PAIRS, HALVES)) if kind.count(scene) == 0]
    return draw.one(["there is", "the image contains"]) + f" no {draw.one(absent).noun}" if absent else None


def _caption(scene: Scene, draw: Draw) -> str | None:
    things = draw.some(filled(scene), 2)
    return " and ".join(f"{a(kind_of(thing))} on the {PLACES[place]}" for place, thing in things)


# Question answering ---------------------------------------------------------------------------------------------------


def questions(scene: Scene, draw: Draw, count: int) -> list[SceneText]:
    """Up to `count` different questions with their answers' places in `ANSWERS`."""
    makers = (_existence, _counting, _at_place, _of_the_one, _where, _beside)
    found = [question for _ in range(count) if (question := draw.one(makers)(scene, draw)) is not None]
    return [
        SceneText(text, {"labels": [ANSWERS.index(answer)], "scores": [1.0]}) for text, answer in dict.fromkeys(found)
    ]


Question = tuple[str, str]


def _existence(scene: Scene, draw: Draw) -> Question | None:
    there = bool(draw.below(2))
    kinds = [kind for kind in draw.one((PAIRS, HALVES)) if (kind.count(scene) > 0) == there]
    if not kinds:
        return None
    asks_absence = draw.below(4) == 0
    text = f"is there {'no' if asks_absence else 'a'} {draw.one(kinds).noun}?"
    return text, "yes" if there != asks_absence else "no"


def _counting(scene: Scene, draw: Draw) -> Question | None:
    kind = draw.of_counts(HALVES, lambda kind: kind.count(scene))
    return f"how many {kind.noun}s are there?", NUMBERS[kind.count(scene)]


def _at_place(scene: Scene, draw: Draw) -> Question | None:
    place, thing = draw.one(filled(scene))
    if draw.below(2):
        return f"what color is the {PLACES[place]} shape?", thing.colour
    return f"what shape is on the {PLACES[place]}?", thing.shape


def _of_the_one(scene: Scene, draw: Draw) -> Question | None:
    _, thing = draw.one(filled(scene))
    by_shape = bool(draw.below(2))
    kind = Kind(shape=thing.shape) if by_shape else Kind(colour=thing.colour)
    if kind.only_place(scene) is None:
        return None
    return (f"what color is the {kind.noun}?", thing.colour) if by_shape else (f"what is the {kind.noun}?", thing.shape)


def _where(scene: Scene, draw: Draw) -> Question | None:
    place, thing = draw.one(filled(scene))
    kind = draw.one(kinds_of(thing))
    return None if kind.only_place(scene) is None else (f"where is the {kind.noun}?", PLACES[place])


def _beside(scene: Scene, draw: Draw) -> Question | None:
    found = _anchored(scene, draw)
    if found is None:
        return None
    thing, direction, kind = found
    if draw.below(2):
        return f"what color is the shape {direction} the {kind.noun}?", thing.colour
    return f"what is {direction} the {kind.noun}?", thing.shape


def _anchored(scene: Scene, draw: Draw) -> tuple[Thing, str, Kind] | None:
    """A thing, its direction from another one, and a description that only that other one fits."""
    found = neighbours(scene)
    if not found:
        return None
    place, direction, other = draw.one(found)
    thing, base = scene[place], scene[other]
    if thing is None or base is None:
        return None
    kind = draw.one(kinds_of(base))
    return None if kind.only_place(scene) is None else (thing, direction, kind)


# Entailment -----------------------------------------------------------------------------------------------------------


def hypotheses(scene: Scene, draw: Draw, count: int) -> list[SceneText]:
    """Up to `count` different hypotheses, each relation as likely; an empty place is one that is not shown.

    What the shown things decide is entailed or contradicted, what the others decide is neutral.
    """
    found: dict[str, int] = {}
    for _ in range(count):
        wanted = draw.below(len(RELATIONS))
        made = draw.one((_about_place, _about_place, _about_existence))(scene, draw, wanted)
        if made is not None:
            found[made] = wanted
    return [SceneText(text, {"labels": [label], "scores": [1.0]}) for text, label in found.items()]


def _about_place(scene: Scene, draw: Draw, wanted: int) -> str | None:
    shown = wanted != NEUTRAL
    places = [place for place, thing in enumerate(scene) if (thing is not None) == shown]
    if not places:
        return None
    place = draw.one(places)
    thing = scene[place]
    kinds = draw.one((PAIRS, HALVES))
    kind = draw.one([kind for kind in kinds if thing is None or kind.fits(thing) == (wanted == ENTAILMENT)])
    what = kind.colour if kind.shape is None else a(kind)
    return f"the {PLACES[place]} shape is {what}"


def _about_existence(scene: Scene, draw: Draw, wanted: int) -> str | None:
    """ "there is a ..." is never contradicted and "there is no ..." never entailed where a place is not shown."""
    hidden = any(thing is None for thing in scene)
    negative = bool(draw.below(2))
    there = {CONTRADICTION: negative, ENTAILMENT: not negative, NEUTRAL: False}[wanted]
    if (wanted == NEUTRAL) != (hidden and not there):
        return None
    kinds = [kind for kind in draw.one((PAIRS, HALVES)) if (kind.count(scene) > 0) == there]
    return f"there is {'no' if negative else 'a'} {draw.one(kinds).noun}" if kinds else None


# Two images -----------------------------------------------------------------------------------------------------------

PairClaim = tuple[str, Callable[[Scene, Scene], bool]]


def pair_claim(draw: Draw) -> PairClaim:
    """A statement about a left and a right scene, and whether it is true of two."""
    kind, other = draw.some(HALVES, 2)
    number = draw.below(2) + 1
    claims: list[PairClaim] = [
        (f"both images contain {a(kind)}", lambda left, right: _has(left, kind) and _has(right, kind)),
        (f"only one image contains {a(kind)}", lambda left, right: _has(left, kind) != _has(right, kind)),
        (f"the left image contains {a(kind)}", lambda left, _: _has(left, kind)),
        (f"the right image contains {a(kind)}", lambda _, right: _has(right, kind)),
        (
            f"the left image contains {a(kind)} and the right image {a(other)}",
            lambda left, right: _has(left, kind) and _has(right, other),
        ),
        (
            f"there are {NUMBERS[number]} {kind.noun}s in the two images",
            lambda left, right: kind.count(left) + kind.count(right) == number,
        ),
    ]
    return draw.one(claims)


def _has(scene: Scene, kind: Kind) -> bool:
    return kind.count(scene) > 0


# Multiple choice with rationale ---------------------------------------------------------------------------------------


def choices(scene: Scene, draw: Draw, count: int) -> list[SceneText]:
    """Up to `count` different questions on a full scene, each with four answers and four rationales."""
    found: dict[str, SceneText] = {}
    for _ in range(count):
        made = draw.one((_in_common, _which_one))(scene, draw)
        if made is not None:
            found[made.text] = made
    return list(found.values())


def _in_common(scene: Scene, draw: Draw) -> SceneText | None:
    """The rationales all say what the right answer says; one of them is true."""
    couples = list(itertools.combinations(filled(scene), 2))  # those with nothing in common would prevail
    (first, one), (second, other) = draw.of_counts(couples, lambda couple: _common_kind(*map(_whole, couple)))
    common = _common_kind(kind_of(one), kind_of(other))

    def say(left: Kind, right: Kind) -> str:
        return f"because {MENTIONS[first]} is {a(left)} and {MENTIONS[second]} is {a(right)}"

    true = say(kind_of(one), kind_of(other))
    false: list[str] = []
    while len(false) < len(COMMON) - 1:
        left, right = draw.one(PAIRS), draw.one(PAIRS)
        if common == _common_kind(left, right) and (text := say(left, right)) not in (true, *false):
            false.append(text)
    question = f"what do {MENTIONS[first]} and {MENTIONS[second]} have in common?"
    return _posed(question, COMMON, common, true, false, draw)


def _whole(entry: tuple[int, Thing]) -> Kind:
    return kind_of(entry[1])


def _common_kind(one: Kind, other: Kind) -> int:
    same = (one.colour == other.colour, one.shape == other.shape)
    return ((True, False), (False, True), (True, True), (False, False)).index(same)


def _which_one(scene: Scene, draw: Draw) -> SceneText | None:
    """The rationales all speak of the right answer's place and the same neighbours; one of them is true."""
    place, thing = draw.one(filled(scene))
    kind = draw.one(kinds_of(thing))
    if kind.only_place(scene) is None:
        return None
    beside = [(direction, at) for direction in DIRECTIONS if (at := neighbour(place, _OPPOSITE[direction])) is not None]

    def say(direction: str, other: Kind) -> str:
        return f"because {MENTIONS[place]} is {direction} {a(other)}"

    direction, at = draw.one(beside)
    base = scene[at]
    if base is None:
        return None
    true = say(direction, kind_of(base))
    false: list[str] = []
    while len(false) < len(PLACES) - 1:
        direction, at = draw.one(beside)
        other = draw.one(PAIRS)
        if not other.fits(scene[at]) and (text := say(direction, other)) not in false:
            false.append(text)
    return _posed(f"which one is the {kind.noun}?", MENTIONS, place, true, false, draw)


_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _posed(question: str, answers: Sequence[str], right: int, true: str, false: Sequence[str], draw: Draw) -> SceneText:
    order = draw.some(range(len(answers)), len(answers))
    rationales = draw.some([true, *false], 1 + len(false))
    target = {
        "answers": [answers[place] for place in order],
        "answer": order.index(right),
        "rationales": rationales,
        "rationale": rationales.index(true),
    }
    return SceneText(question, target)


# Referring expressions and captions -----------------------------------------------------------------------------------


def expressions(scene: Scene, draw: Draw, count: int) -> list[SceneText]:
    """Up to `count` different expressions, each of which fits one thing; target: its `place`."""
    found: dict[str, int] = {}
    for _ in range(count):
        place, thing = draw.one(filled(scene))
        form = draw.below(8)
        kind = draw.one(kinds_of(thing))
        if form == 0:
            found[f"the {PLACES[place]} shape"] = place
        elif form <= 3 and kind.only_place(scene) is not None:
            found[f"the {kind.noun}"] = place
        elif form >= 4 and (anchored := _anchored_at(scene, place, draw)) is not None:
            direction, base = anchored
            found[f"the {draw.one((Kind(), Kind(shape=thing.shape))).noun} {direction} the {base.noun}"] = place
    return [SceneText(text, {"place": place}) for text, place in found.items()]


def _anchored_at(scene: Scene, place: int, draw: Draw) -> tuple[str, Kind] | None:
    """A direction from another thing that leads to `place`, and a description that only the other one fits."""
    beside = [(direction, other) for at, direction, other in neighbours(scene) if at == place]
    if not beside:
        return None
    direction, other = draw.one(beside)
    base = scene[other]
    kind = None if base is None else draw.one(kinds_of(base))
    return None if kind is None or kind.only_place(scene) is None else (direction, kind)


def captions(scene: Scene, draw: Draw, count: int) -> list[SceneText]:
    """Up to `count` different captions: two things with their places, or one beside another."""
    texts: list[str] = []
    for _ in range(count):
        found = neighbours(scene)
        if found and draw.below(2):
            place, direction, other = draw.one(found)
            thing, base = scene[place], scene[other]
            if thing is not None and base is not None:
                texts.append(f"{a(kind_of(thing))} {direction} {a(kind_of(base))}")
        else:
            texts.append(_caption(scene, draw) or "")
    return [SceneText(text) for text in dict.fromkeys(texts) if text]
