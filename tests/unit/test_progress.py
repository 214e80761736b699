"""The line that long work on shards tells."""

import io

import pytest

from villa_ds.data import progress
from villa_ds.data.progress import duration, with_progress


class Clock:
    """Time that passes by two seconds at every look."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 2
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "time", Clock())


def test_plain_lines_now_and_then() -> None:
    stream = io.StringIO()
    assert list(with_progress(range(12), 12, "writing", stream)) == list(range(12))
    assert stream.getvalue().splitlines() == [
        "writing: 5/12, 0.50/s, 0:14 left",
        "writing: 10/12, 0.50/s, 0:04 left",
        "writing: 12 in 26.0 s",
    ]


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    list(with_progress(range(2), 2, "writing", stream))
    assert stream.getvalue() == (
        "\rwriting: [##########..........] 1/2, 0.50/s, 0:02 left\rwriting: 2 in 6.0 s" + " " * 35 + "\n"
    )


def test_going_on() -> None:
    """The rate is that of this run, the count that of all."""
    stream = io.StringIO()
    list(with_progress(range(6), 106, "writing", stream, before=100))
    assert stream.getvalue().splitlines() == ["writing: 105/106, 0.50/s, 0:02 left", "writing: 106 in 14.0 s"]


def test_without_a_total() -> None:
    short, long = io.StringIO(), io.StringIO()
    list(with_progress(range(3), None, "listing", short))
    list(with_progress(range(7), None, "listing", long))
    assert short.getvalue() == ""
    assert long.getvalue().splitlines() == ["listing: 5, 0/s", "listing: 7 in 16.0 s"]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]
