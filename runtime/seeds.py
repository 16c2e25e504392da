"""Randomness as a function of where it is used, so that nothing has to be saved to resume."""

import numpy as np


def mix(*parts: int) -> int:
    """A 63-bit seed that is a function of non-negative integers, e.g. (seed, step, rank), without visible pattern."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)
