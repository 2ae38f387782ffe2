"""The part of a variance that a log with few surprises does not show.

Where what matters is rare, such as a click or a death, a log may show none of it just where two policies differ. What it shows
there varies too little, and a bound for large numbers then excludes the truth: where one event was to be expected, in a third
of all logs.
"""

import numpy as np
from jaxtyping import Float64

from offrl_models.ope.diagnostics import effective_sample_size

FEW = 10.0  # surprises to be expected at which half of what is missing is believed to be missing by chance


def unseen_variance(shift: Float64[np.ndarray, "rows"], surprise: Float64[np.ndarray, "rows"], episodes: int) -> float:
    """What may be missing from the variance, over episodes, of the sum of `shift` times `surprise` over their rows; 0 or more.

    `shift` is the discounted weight of a policy less that of the one it is compared with, `surprise` the Bellman error of each
    row: of mean 0, so that the variance is the mean of the sum of their squared product. Were surprises as large wherever the
    policies differ, that would be the mean of the squared shifts times the mean of the squared surprises. Where the log shows less,
    that is a fact of the world or an accident of few surprises. How many are to be expected is told by the effective numbers of
    squared shifts and of squared surprises; the more, the less of the difference is added: FEW / (FEW + expected) of it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        shifted, size = np.square(shift), np.square(surprise)
        missing = shifted.sum() * size.mean() - (shifted * size).sum()
    if not (np.isfinite(missing) and missing > 0):
        return 0.0  # weights that overflow are said where they are met
    expected = effective_sample_size(shifted) * effective_sample_size(size) / len(size)
    return float(missing / episodes * FEW / (FEW + expected))
