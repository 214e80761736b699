"""Reads the demo benchmark's texts and says what is right about them: without its templates, from the facts alone.

A scene is a list of four: (colour, shape) by place in reading order, None where a place is empty.
"""

import itertools
import re

Thing = tuple[str, str]
Scene = list[Thing | None]

PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}  # column, row
NUMBERS = ("zero", "one", "two", "three", "four")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
C, S, W = "|".join(COLOURS), "|".join(SHAPES), "|".join(PLACES)
D = "left of|right of|above|below"
N = rf"(?:{C}) (?:{S}|shape)|{S}|shape"  # a noun
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def fits(noun: str, thing: Thing | None) -> bool:
    return thing is not None and all(word in (*thing, "shape") for word in noun.split())


def at(scene: Scene, place: str) -> Thing | None:
    column, row = PLACES[place]
    return scene[2 * row + column]


def those(scene: Scene, noun: str) -> list[str]:
    """Places of all that a noun fits."""
    return [place for place in PLACES if fits(noun, at(scene, place))]


def beside(place: str, direction: str) -> str | None:
    """The place that lies in a direction from another one."""
    wanted = tuple(sum(pair) for pair in zip(PLACES[place], STEPS[direction], strict=True))
    return next((name for name, position in PLACES.items() if position == wanted), None)


def the(scene: Scene, noun: str) -> str:
    """The place of the only one; an expression that fits none or several is an error of the benchmark."""
    (place,) = those(scene, noun)
    return place


def is_true(text: str, scene: Scene) -> bool:  # noqa: PLR0911  # a form of statement each
    """Whether a statement holds of a scene."""
    if match := re.fullmatch(rf"(?:there is|the image contains) (a|no) ({N})", text):
        return bool(those(scene, match[2])) == (match[1] == "a")
    if match := re.fullmatch(rf"there are (\w+) ({N})s", text):
        return len(those(scene, match[2])) == NUMBERS.index(match[1])
    if match := re.fullmatch(rf"(?:there is )?a ({N}) on the ({W})(?: and (.+))?", text):
        return fits(match[1], at(scene, match[2])) and (match[3] is None or is_true(match[3], scene))
    if match := re.fullmatch(rf"the ({W}) shape is (?:a )?(.+)", text):
        return fits(match[2], at(scene, match[1]))
    if match := re.fullmatch(rf"the ({S}) on the ({W}) is ({C})", text):
        return at(scene, match[2]) == (match[3], match[1])
    if match := re.fullmatch(rf"the ({N}) is on the ({W})", text):
        return the(scene, match[1]) == match[2]
    if match := re.fullmatch(rf"the shape ({D}) the ({N}) is (?:a )?(.+)", text):
        place = beside(the(scene, match[2]), match[1])
        return place is not None and fits(match[3], at(scene, place))
    if match := re.fullmatch(rf"the ({N}) is (?:a )?({C}|{S})", text):
        return fits(match[2], at(scene, the(scene, match[1])))
    if match := re.fullmatch(rf"a ({N})(?: is)? ({D}) (a|the) ({N})", text):
        bases = [the(scene, match[4])] if match[3] == "the" else those(scene, match[4])
        return any(fits(match[1], at(scene, place)) for base in bases if (place := beside(base, match[2])))
    raise AssertionError(f"unknown statement: {text}")


def answer_of(text: str, scene: Scene) -> str:
    """The answer to a question about a scene."""
    if match := re.fullmatch(rf"is there (a|no) ({N})\?", text):
        return "yes" if bool(those(scene, match[2])) == (match[1] == "a") else "no"
    if match := re.fullmatch(rf"how many ({N})s are there\?", text):
        return NUMBERS[len(those(scene, match[1]))]
    if match := re.fullmatch(rf"where is the ({N})\?", text):
        return the(scene, match[1])
    asked, rest = (0, text[len("what color is the ") :]) if text.startswith("what color") else (1, text)
    if match := re.fullmatch(rf".*?({D}) the ({N})\?", rest):
        place = beside(the(scene, match[2]), match[1])
    elif match := re.fullmatch(rf"(?:what shape is on the )?({W})(?: shape)?\?", rest):
        place = match[1]
    elif match := re.fullmatch(rf"(?:what is the )?({N})\?", rest):
        place = the(scene, match[1])
    else:
        raise AssertionError(f"unknown question: {text}")
    thing = None if place is None else at(scene, place)
    assert thing is not None, text
    return thing[asked]


def relation_of(text: str, scene: Scene) -> str:
    """contradiction, entailment or neutral: whether a statement holds whatever the empty places hide."""
    (noun,) = re.findall(rf"({N}|{C})$", text)
    colour = next((word for word in noun.split() if word in COLOURS), "red")
    shape = next((word for word in noun.split() if word in SHAPES), "circle")
    other = ("blue" if colour == "red" else "red", "triangle" if shape == "circle" else "circle")
    hidden = [place for place, thing in enumerate(scene) if thing is None]
    found = set()
    for filling in itertools.product([(colour, shape), other], repeat=len(hidden)):
        world = list(scene)
        for place, thing in zip(hidden, filling, strict=True):
            world[place] = thing
        found.add(is_true(text, world))
    return {frozenset([True]): "entailment", frozenset([False]): "contradiction"}.get(frozenset(found), "neutral")


def is_true_of_two(text: str, left: Scene, right: Scene) -> bool:
    """Whether a statement about a left and a right scene holds."""
    if match := re.fullmatch(rf"(both images contain|only one image contains) a ({N})", text):
        count = sum(bool(those(scene, match[2])) for scene in (left, right))
        return count == (2 if match[1].startswith("both") else 1)
    if match := re.fullmatch(rf"there are (\w+) ({N})s in the two images", text):
        return len(those(left, match[2])) + len(those(right, match[2])) == NUMBERS.index(match[1])
    if match := re.fullmatch(rf"the (left|right) image contains a ({N})(?: and the right image a ({N}))?", text):
        own = bool(those(left if match[1] == "left" else right, match[2]))
        return own and (match[3] is None or bool(those(right, match[3])))
    raise AssertionError(f"unknown statement: {text}")


def place_of(text: str, scene: Scene) -> int:
    """What an expression refers to."""
    if match := re.fullmatch(rf"the ({W}) shape", text):
        place = match[1]
    elif match := re.fullmatch(rf"the ({N}) ({D}) the ({N})", text):
        found = beside(the(scene, match[3]), match[2])
        assert found is not None
        assert fits(match[1], at(scene, found)), text
        place = found
    elif match := re.fullmatch(rf"the ({N})", text):
        place = the(scene, match[1])
    else:
        raise AssertionError(f"unknown expression: {text}")
    assert at(scene, place) is not None
    return list(PLACES).index(place)


def right_choices(
    question: str, answers: list[str], rationales: list[str], scene: Scene
) -> tuple[list[int], list[int]]:
    """Which answers and which rationales are right; mentions are the places in reading order."""

    def mentioned(text: str) -> list[int]:
        return [int(number) - 1 for number in re.findall(r"\[object(\d)\]", text)]

    if question.startswith("which one is the "):
        place = place_of(question.removeprefix("which one is ").removesuffix("?"), scene)
        right = [number for number, answer in enumerate(answers) if mentioned(answer) == [place]]
    else:
        one, other = (scene[place] for place in mentioned(question))
        assert one is not None
        assert other is not None
        same = [word for word, equal in (("color", one[0] == other[0]), ("shape", one[1] == other[1])) if equal]
        right = [number for number, answer in enumerate(answers) if re.findall("color|shape", answer) == same]

    def holds(rationale: str) -> bool:
        said = rationale.removeprefix("because ").replace(" and [", ";[").split(";")
        results = []
        for part in said:
            (place,) = mentioned(part)
            if match := re.fullmatch(rf"\[object\d\] is a ({N})", part):
                results.append(fits(match[1], scene[place]))
            elif match := re.fullmatch(rf"\[object\d\] is ({D}) a ({N})", part):
                name = list(PLACES)[place]
                results.append(any(beside(base, match[1]) == name for base in those(scene, match[2])))
            else:
                raise AssertionError(f"unknown rationale: {rationale}")
        return all(results)

    return right, [number for number, rationale in enumerate(rationales) if holds(rationale)]
