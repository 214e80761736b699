import re

import pytest

from villa_ds.data.convert.statements import COLOURS, SHAPES, Facts, facts_of, statements_of
from villa_ds.errors import DataError
from villa_ds.rng import Stream


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what is the blue shape?", "rectangle", Facts("blue", "rectangle", (), ())),
        ("what color is the circle?", "teal", Facts("teal", "circle", (), ())),
        ("what color is the shape?", "red", Facts("red", None, (), ())),
        ("what shape is present?", "triangle", Facts(None, "triangle", (), ())),
        ("is there a red shape?", "yes", Facts("red", None, (), ())),
        ("is there a red shape?", "no", Facts(None, None, ("red",), ())),
        ("is there not a red shape?", "yes", Facts(None, None, ("red",), ())),
        ("is no red shape present?", "no", Facts("red", None, (), ())),
        ("does the image not contain a circle?", "no", Facts(None, "circle", (), ())),
        ("does the image not contain a circle?", "yes", Facts(None, None, (), ("circle",))),
    ],
)
def test_facts_of_each_kind_of_question(question, answer, expected):
    assert facts_of([(question, answer)]) == expected


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([("is there a red shape?", "yes"), ("is no red shape present?", "yes")], "say both"),
        ([("what color is the shape?", "red"), ("is there a blue shape?", "yes")], "say both"),
        ([("is there a red circle?", "yes")], "of no known kind"),
        ([("what is it?", "three")], "of no known kind"),
    ],
)
def test_contradictions_and_unknown_questions_are_refused(questions, message):
    with pytest.raises(DataError, match=message):
        facts_of(questions)


def holds(statement: str, colour: str, shape: str) -> bool:
    """Whether a statement is true of an image of one shape, read without the module's templates."""
    words = re.findall(r"[a-z]+", statement)
    clauses, denied = [[]], [False]
    for word in words:
        if word in ("but", "and"):
            clauses.append([])
            denied.append(False)
        elif word in ("no", "not", "nothing"):
            denied[-1] = True
        clauses[-1].append(word)
    return all(
        all((word in (colour, shape)) != denial for word in clause if word in COLOURS | SHAPES)
        for clause, denial in zip(clauses, denied, strict=True)
    )


def test_statements_are_true_different_and_varied():
    seen = set()
    for colour in sorted(COLOURS):
        for shape in sorted(SHAPES):
            facts = Facts(colour, shape, tuple(sorted(COLOURS - {colour}))[:3], tuple(sorted(SHAPES - {shape})))
            for seed in range(5):
                statements = statements_of(facts, Stream(seed, colour, shape))
                assert len(set(statements)) == len(statements) == 9
                assert all(holds(statement, colour, shape) for statement in statements), statements
                other = next(iter(COLOURS - {colour}))
                assert sum(holds(statement, other, shape) for statement in statements) <= 4
                seen |= {re.sub("|".join(COLOURS | SHAPES), "_", statement) for statement in statements}
    assert len(seen) >= 28  # templates, colour and shape blotted out


def test_statements_say_no_more_than_the_facts():
    assert statements_of(Facts(None, None, (), ()), Stream(0)) == []
    only_absent = statements_of(Facts(None, None, ("red",), ("circle",)), Stream(0))
    assert len(only_absent) == 2
    assert all(re.search(r"\b(no|not|nothing)\b", statement) for statement in only_absent)
    only_colour = statements_of(Facts("red", None, (), ()), Stream(0))
    assert len(only_colour) == 1
    assert "red" in only_colour[0]


def test_statements_depend_on_the_stream_alone():
    facts = Facts("red", "circle", ("blue", "teal"), ("triangle",))
    assert statements_of(facts, Stream(1)) == statements_of(facts, Stream(1))
    assert statements_of(facts, Stream(1)) != statements_of(facts, Stream(2))
