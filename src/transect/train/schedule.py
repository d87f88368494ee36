"""What the learning rate is multiplied with at each step."""

import math

from transect.errors import InputError
from transect.train.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of step number `step`, counted from 0, of a run of `steps`; 0 .. 1, dimensionless.

    Warm-up of w steps: (step + 1) / w, so that the first step is not lost at rate 0 and step w - 1 is the first at 1.
    Then, p being the share done of the steps from w (for `wsd`, from the start of the decay) to the horizon:
    linear 1 - (1 - final) p; cosine final + (1 - final) (1 + cos(pi p)) / 2. `final` is reached when as many steps as
    the horizon are done, so that no step inside it is lost where `final` is 0, and it holds from there on. The horizon
    is `steps` by default; a run that is shorter than its horizon, or than its warm-up, ends on the way.
    Raises InputError for a horizon that ends before the warm-up inside the run.
    """
    horizon = config.horizon or steps
    if config.kind != "constant" and horizon < config.warmup < steps:
        why = f"warm-up alone takes {config.warmup} steps; give a later horizon or a shorter warm-up"
        raise InputError(f"train.schedule.horizon is {horizon}: {why}")
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.kind == "constant":
        return 1.0
    if step >= horizon:
        return config.final
    start = float(config.warmup)
    if config.kind == "wsd":
        start = max(start, horizon * (1 - config.decay))
    done = max(0.0, (step - start) / (horizon - start))
    if config.kind == "cosine":
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
    return 1 - (1 - config.final) * done
