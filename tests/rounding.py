"""How far rounding alone can move a sum in float32: the tolerance of a sum that cancels."""

import numpy as np

EPS = float(np.finfo(np.float32).eps)


def bound(count: int, size: float) -> float:
    """Largest difference between two float32 sums of the same `count` terms, added up in any two orders.

    `size` is the sum of the terms' absolute values (for a mean, their mean). Each addition rounds a partial sum, which is
    never larger than `size`, by at most half of EPS; two sums of count - 1 additions are thus within count * EPS * size
    (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). Where the terms cancel, the sum is far smaller
    than `size` and any relative tolerance asks for digits that float32 does not have: compare with `rtol=0`.
    """
    return count * EPS * float(size)
