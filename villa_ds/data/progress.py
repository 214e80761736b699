"""A progress line for long work on shards: rewritten in place on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")
_TERMINAL_PERIOD, _PLAIN_PERIOD = 0.2, 10.0  # seconds between updates


def with_progress(items: Iterable[T], total: int, what: str, stream: TextIO | None = None) -> Iterator[T]:
    """Pass `items` on, telling `stream` (stderr) how many of `total` are done."""
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    period = _TERMINAL_PERIOD if terminal else _PLAIN_PERIOD
    before, after = ("\r", "") if terminal else ("", "\n")
    told = start = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told >= period and done < total:
            told = now
            stream.write(f"{before}{what}: {done}/{total}{after}")
            stream.flush()
    stream.write(f"{before}{what}: {total} in {time.monotonic() - start:.1f} s\n")
    stream.flush()
