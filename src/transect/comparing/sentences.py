"""What a comparison says in plain words."""

from collections.abc import Iterable, Sequence

from transect.comparing.alignment import UNMEASURED, Alignment
from transect.comparing.arms import Arm
from transect.comparing.curves import read_off
from transect.comparing.facts import rate_factor
from transect.comparing.findings import Finding
from transect.comparing.statistics import ONE_SEED, Difference
from transect.summaries import number


def sentences(found: Iterable[Finding]) -> list[str]:
    """One for each quantity and arm beside the baseline, but for what only says another again."""
    told = []
    for one in found:
        if one.baseline is None or one.repeats is not None or unmeasured(one):
            continue
        if one.alignment.main or one.quantity.headline:
            told.append(_sentence(one, one.baseline))
    return told


def unmeasured(one: Finding) -> bool:
    """Whether there is nothing to say because a run was not measured at all."""
    return one.difference is None and any(reason.endswith(UNMEASURED) for reason in one.reasons.values())


def _sentence(one: Finding, baseline: str) -> str:
    name = one.quantity.words
    start = f"At equal {one.alignment.words}, {one.arm.name}"
    if one.difference is None:
        why = next(iter(one.reasons.values()), f"{baseline} has no value")
        return f"{start} cannot be compared with {baseline} by {name}: {why}."
    article = "an" if name[0] in "aeiou" else "a"
    size = _size(one.difference, one.quantity.ending)
    return f"{start} has {article} {name} {size} than {baseline} ({_support(one)}){_end(one)}"


def _size(difference: Difference, ending: str) -> str:
    """lower by 0.021 [0.004, 0.038] nats."""
    value, error = difference.mean.value, difference.mean.error
    sign, word = (-1, "lower") if value < 0 else (1, "higher")
    if error is None:
        return f"{word} by {short(abs(value))}{ending}"
    low, high = sorted((sign * error.low, sign * error.high))
    return f"{word} by {short(abs(value))} [{short(low)}, {short(high)}]{ending}"


def _support(one: Finding) -> str:
    difference = one.difference
    assert difference is not None
    seeds = f"{difference.mean.n} seed{'s' * (difference.mean.n != 1)}"
    if difference.p is None:
        return f"{seeds}; {difference.mean.reason or 'the differences do not vary over them'}"
    words = [seeds, p_word(difference.p)]
    if one.holm is not None:
        words.append(f"Holm {p_word(one.holm).removeprefix('p ').removeprefix('= ')}")
    return ", ".join(words)


def _end(one: Finding) -> str:
    return "." if one.verdict is None else f": {one.verdict}."


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e4 else number(value)


def p_word(p: float) -> str:
    """p = .03, p < .001."""
    return "p < .001" if p < 0.001 else f"p = {p:.2g}".replace("0.", ".") if p < 0.995 else "p = 1"


def notes(arms: Sequence[Arm], alignments: Sequence[Alignment], found: Sequence[Finding]) -> list[str]:
    """What a reader has to know before believing the numbers."""
    told = []
    if len(arms) == 1:
        told.append(f"all runs are of one arm, {arms[0].name}: there is no difference to tell")
    if any(len(arm.runs) == 1 for arm in arms):
        told.append(f"{', '.join(arm.name for arm in arms if len(arm.runs) == 1)}: {ONE_SEED}")
    told += [f"no comparison at {one.name}: {one.reason}" for one in alignments if one.reason]
    some = {one.quantity.words: reason for one in found if unmeasured(one) for reason in one.reasons.values()}
    if some:
        name, reason = next(iter(some.items()))
        told.append(f"{len(some)} quantities were not measured in all runs and are left out, such as {name}: {reason}")
    told += dict.fromkeys(_pairing(one) for one in found if one.difference is not None and one.difference.left_out)
    for alignment in alignments:
        if alignment.main and (decayed := _decayed(arms, alignment)):
            told.append(
                f"the learning rate of {', '.join(decayed)} had decayed before {alignment.name}; "
                "runs at different points of a decay do not compare: train at a constant rate, or read wsd before"
            )
    return told


def _pairing(one: Finding) -> str:
    assert one.difference is not None
    if not one.difference.each:
        return f"{one.arm.name} and {one.baseline} have no seed in common: unpaired, Welch's interval"
    return f"{one.arm.name} and {one.baseline} do not have the same seeds: differences are of the common ones only"


def _decayed(arms: Sequence[Arm], alignment: Alignment) -> list[str]:
    found = []
    for arm in arms:
        for run in arm.runs.values():
            rate = rate_factor(run, read_off(run.steps, alignment.place(run)))
            if rate is not None and rate < 1:
                found.append(run.name)
    return sorted(found)
