"""Who is named, and when: the observer alone, without processes."""

from typing import Any

import pytest

from villa_ds.errors import EXIT_RANK_LOST
from villa_ds.train.watch import Note, Observer, interval, linger, silence

TIMEOUT_S = 20.0


def note(beat: int, progress: tuple[int, int] = (3, 7), stage: str = "update", **state: Any) -> Note:
    return Note(job="j", beat=beat, progress=progress, step=5, stage=stage, **state)


def verdict(
    *notes_by_second: dict[int, Note | None], ranks: int = 2, judges: bool = True
) -> tuple[float, str, int] | None:
    """(second, message, exit code) of the first verdict; the last notes stay as they are for ever."""
    observer = Observer(range(ranks), TIMEOUT_S, judges_progress=judges)
    for second in range(1, 100):
        notes = notes_by_second[min(second, len(notes_by_second)) - 1]
        found = observer.look(notes, 1.0, trouble=False)
        if found is not None:
            return second, *found
    return None


def alive(seconds: int, **others: Note) -> list[dict[int, Note | None]]:
    """Rank 0 lives and moves; what is given of `r1` stays."""
    return [{0: note(second, (second, 0)), 1: others["r1"]} for second in range(seconds)]


def test_ranks_that_move_are_left_alone() -> None:
    observer = Observer(range(2), TIMEOUT_S, judges_progress=True)
    for second in range(1000):
        notes: dict[int, Note | None] = {rank: note(second, (second // 19, 0)) for rank in range(2)}
        assert observer.look(notes, 1.0, trouble=False) is None


def test_silence_is_told_after_the_timeout() -> None:
    told = verdict(*alive(99, r1=note(4, stage="saving")))
    assert told == (
        21, "rank 1 died or is frozen: no sign of life for 20 s; last at step 5, saving", EXIT_RANK_LOST,
    )  # fmt: skip


def test_trouble_anywhere_shortens_the_wait() -> None:
    notes = [{0: note(second, (second, 0), trouble="RuntimeError: reset"), 1: note(4)} for second in range(99)]
    told = verdict(*notes)
    assert told is not None
    assert told[0] == 1 + silence(TIMEOUT_S)
    assert told[0] + 2 * interval(TIMEOUT_S) < linger(TIMEOUT_S) + 1  # the rank in trouble is still there to hear it


def test_a_rank_that_never_wrote() -> None:
    told = verdict(*[{0: note(second, (second, 0)), 1: None} for second in range(99)])
    assert told == (20, "rank 1 died or is frozen: no sign of life for 20 s; it wrote nothing at all", EXIT_RANK_LOST)


def test_the_rank_that_is_behind_is_named() -> None:
    notes = [
        {0: note(second, (8, 40)), 1: note(second, (7, 40), stage="loading data"), 2: note(second, (8, 41))}
        for second in range(99)
    ]
    told = verdict(*notes, ranks=3)
    assert told == (
        21, "rank 1 has not moved for 20 s; last at step 5, loading data; 2 further on wait", EXIT_RANK_LOST
    )  # fmt: skip


def test_all_at_the_same_place() -> None:
    told = verdict(*[{rank: note(second) for rank in range(3)} for second in range(99)], ranks=3)
    assert told is not None
    assert told[1] == "3 ranks, 0 first, have not moved for 20 s; all last at step 5, update"


def test_a_silent_one_among_those_that_stand_still() -> None:
    """It froze at the place where the others wait: that it is silent says more than where it is."""
    told = verdict(*[{0: note(second), 1: note(min(second, 3), (4, 0))} for second in range(99)])
    assert told is not None
    assert told[1].startswith("rank 1 died or is frozen: no sign of life for ")


def test_one_that_moves_is_enough() -> None:
    """Rank 0 alone commits a checkpoint; who waits for it is not stuck."""
    notes = [{0: note(second, (second // 10, 0)), 1: note(second)} for second in range(99)]
    assert verdict(*notes) is None


@pytest.mark.parametrize("trouble", [None, "RuntimeError: Connection closed by peer"])
def test_a_rank_that_failed_alone_hands_on_its_exit_code(trouble: str | None) -> None:
    gone = note(4, stage="loading data", ended=("DamageError: shard", 3))
    told = verdict(*[{0: note(second, (second, 0), trouble=trouble), 1: gone} for second in range(99)])
    assert told is not None
    assert told[1:] == ("rank 1 ended (DamageError: shard); last at step 5, loading data", 3)
    assert told[0] == (1 if trouble else 1 + 2 * linger(TIMEOUT_S))  # else: it may be an error of all ranks


def test_a_rank_that_is_done_is_not_missed() -> None:
    assert verdict(*alive(99, r1=note(4, ended=("done", 0)))) is None


def test_the_others_follow_rank_0() -> None:
    """They read its note only, and judge nothing but its silence."""
    told = ("rank 2 died", EXIT_RANK_LOST)
    assert verdict({0: note(1, verdict=told)}, ranks=1, judges=False) == (1, *told)
    assert verdict(*[{0: note(second)} for second in range(99)], ranks=1, judges=False) is None
