"""Intervals of shares: how sure one is of k in n.

Wilson's score interval (1927) inverts the normal test of a share, so it stays within [0, 1] and keeps its level also
near the ends, where the textbook interval shrinks to nothing.
"""

from __future__ import annotations

from imagekiln.errors import DataError

NORMAL_975 = 1.959964


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), honest also near 0 and 1.

    >>> low, high = wilson(10, 10); round(low, 2), high
    (0.72, 1.0)
    """
    if not 0 <= successes <= n or n < 1:
        raise DataError(f"A share needs 0 <= successes <= n and n >= 1; it got {successes} of {n}.")
    z, share = NORMAL_975, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At the ends the formula gives 0 and 1 up to rounding.
    return (0.0 if not successes else centre - half), (1.0 if successes == n else centre + half)
