"""Packing: a window's lengths, sorted, are cut into micro-batches under a token budget.

The procedure is the release's token-bucket sampler (ChenRocks/UNITER, `TokenBucketSampler`) with two differences: the
longest row is taken anew for each micro-batch, so that short rows get larger micro-batches, and the last two share
their rows evenly, because an optimizer step weighs micro-batches alike, however few rows they have.
"""

import numpy as np
from numpy.typing import NDArray

from villa_ds.errors import ConfigError


def pack(lengths: NDArray[np.integer], tokens: int, rows_multiple: int) -> NDArray[np.int64]:
    """Bounds [n + 1] of n micro-batches of `lengths` [N], which are sorted in descending order.

    Micro-batch i holds the positions ``bounds[i]:bounds[i + 1]``. Its rows are a multiple of `rows_multiple`, but for
    the last one's; rows (rounded up to that multiple) x longest row are at most `tokens`. Raises ConfigError if
    `rows_multiple` of the longest rows exceed the budget.
    """
    if len(lengths) == 0:
        return np.zeros(1, np.int64)
    require_budget(int(lengths[0]), tokens, rows_multiple, "a row")
    bounds = [0]
    while bounds[-1] < len(lengths):
        start = bounds[-1]
        rows = tokens // (int(lengths[start]) * rows_multiple) * rows_multiple
        bounds.append(min(start + rows, len(lengths)))
    if len(bounds) > 2:
        bounds[-2] = _evened(bounds[-3], bounds[-2], bounds[-1], rows_multiple)
    return np.array(bounds, np.int64)


def _evened(start: int, middle: int, stop: int, rows_multiple: int) -> int:
    """The bound between the last two micro-batches that divides their rows most evenly, never later than `middle`.

    The budget holds without a look at it: the one before the last only shrinks, and the last one gets no more rows
    (rounded up) than that has, none of them longer than its longest.
    """
    half = -(-(stop - start) // (2 * rows_multiple)) * rows_multiple
    return min(middle, start + half)


def require_budget(length: int, tokens: int, rows_multiple: int, owner: str) -> None:
    """Raise ConfigError unless `rows_multiple` rows as long as `owner`'s fit into `tokens`."""
    if length * rows_multiple > tokens:
        raise ConfigError(
            f"data.tokens: {tokens} does not do: {owner} has length {length}, and {rows_multiple} such rows "
            f"(data.rows_multiple) need {length * rows_multiple}; raise the one or lower the other"
        )
