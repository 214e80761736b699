"""A progress line for long work on shards: rewritten in place on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")
_TERMINAL_PERIOD, _PLAIN_PERIOD = 0.2, 10.0  # seconds between updates
_BAR = 20  # characters


def with_progress(
    items: Iterable[T], total: int | None, what: str, stream: TextIO | None = None, before: int = 0
) -> Iterator[T]:
    """Pass `items` on, telling `stream` (stderr) how many of `total` are done, their rate and the time left.

    `before`: how many an earlier run has done; `items` are the rest. Without `total` only the count and the rate.
    """
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    period = _TERMINAL_PERIOD if terminal else _PLAIN_PERIOD
    told = start = time.monotonic()
    done, width = before, 0
    for done, item in enumerate(items, start=before + 1):
        yield item
        now = time.monotonic()
        if now - told >= period and done != total:
            told = now
            line = _line(what, done, total, (done - before) / (now - start), terminal)
            stream.write(f"\r{line.ljust(width)}" if terminal else f"{line}\n")
            stream.flush()
            width = len(line)
    # what took no time needs no line, unless the total is known: then the line says what was done
    if total is not None or width:
        line = f"{what}: {done} in {time.monotonic() - start:.1f} s"
        stream.write(f"\r{line.ljust(width)}\n" if terminal else f"{line}\n")
        stream.flush()


def _line(what: str, done: int, total: int | None, rate: float, terminal: bool) -> str:
    if total is None:
        return f"{what}: {done}, {rate:.0f}/s"
    filled = _BAR * done // total
    bar = f" [{'#' * filled}{'.' * (_BAR - filled)}]" if terminal else ""
    return f"{what}:{bar} {done}/{total}, {rate:.{0 if rate >= 10 else 2}f}/s, {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
