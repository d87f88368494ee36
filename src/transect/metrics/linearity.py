"""Cone correction and the numbers that stand beside a linearity score."""

NORMALIZATIONS = ("A", "B")
_SAME = 1e-6  # the rounding of a cone of float32 vectors


def normalized(score: float, cone: float, how: str) -> float | None:
    """Score corrected for the cone its targets lie in: A (score - cone) / (1 - cone), B score - cone.

    None when A has no value because all targets point the same way, to 1e-6. Source: arXiv 2101.04547; the formula is
    not published, A is assumed with confidence 0.65, so both are written. A predictor that ignores its input can score
    above 0 under both: the constant baseline stands beside them.
    """
    if how == "B":
        return score - cone
    if how == "A":
        return None if cone >= 1 - _SAME else (score - cone) / (1 - cone)
    raise ValueError(f"unknown cone normalisation {how!r}; allowed are A and B")


def insample_floor(rank: int, samples: int) -> float | None:
    """Expected in-sample R^2 of targets independent of the inputs: rank / (n - 1); None for fewer than two samples.

    At most 1. The rank stands where the paper of the formula has d: an input without variance in some direction cannot
    fit along it.
    """
    return None if samples < 2 else min(1.0, rank / (samples - 1))
