"""Arms: the runs of one recipe, told apart by their seeds alone."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transect.comparing.reading import Run
from transect.errors import InputError
from transect.train.folder import FREE

_FREE = (*(name for name in FREE if name != "name"), "train.seed", "train.evaluation.batch_size")


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs whose recipes are equal, but for settings that change no loss, by their seed."""

    name: str
    runs: Mapping[int, Run]


def arms_of(runs: Sequence[Run], baseline: str | None = None) -> list[Arm]:
    """The runs by recipe, the baseline first, the others by name.

    An arm has its recipe's name, and where recipes of one name differ also the settings that tell them apart. Without
    `baseline` it is the arm of the first run. Raises InputError for a baseline that no arm is called, and two runs of
    one recipe and seed.
    """
    settings = {run.name: _settings(run) for run in runs}
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[json.dumps(settings[run.name], sort_keys=True)].append(run)
    names = _names({key: settings[group[0].name] for key, group in groups.items()})
    arms = [Arm(names[key], _by_seed(group)) for key, group in groups.items()]
    if baseline is None:
        baseline = arms[0].name
    if baseline not in names.values():
        raise InputError(f"no arm is called {baseline!r}; the baseline may be {', '.join(sorted(names.values()))}")
    return sorted(arms, key=lambda arm: (arm.name != baseline, arm.name))


def _by_seed(group: Sequence[Run]) -> dict[int, Run]:
    found: dict[int, Run] = {}
    for run in sorted(group, key=lambda run: run.seed):
        if run.seed in found:
            other = found[run.seed].path
            raise InputError(f"{other} and {run.path} are of one recipe and one seed, {run.seed}; give one of them")
        found[run.seed] = run
    return found


def _settings(run: Run) -> dict[str, Any]:
    def free(name: str) -> bool:
        return any(name == one or name.startswith(f"{one}.") for one in _FREE)

    return {name: value for name, value in _flat(run.recipe).items() if not free(name)}


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {path: tree}
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found


def _names(settings: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """A name for each arm: of those that share one, with as many of the differing settings as tell them apart."""
    alike: dict[str, list[str]] = defaultdict(list)
    for key, own in settings.items():
        alike[str(own.get("name", "recipe"))].append(key)
    found = {}
    for name, keys in alike.items():
        known = sorted({setting for key in keys for setting in settings[key]})
        differing = [one for one in known if len({json.dumps(settings[key].get(one)) for key in keys}) > 1]
        words = {key: [name] for key in keys}
        for setting in differing:
            if len({tuple(own) for own in words.values()}) == len(keys):
                break
            for key, own in words.items():
                own.append(f"{setting}={settings[key].get(setting)}")
        found |= {key: " ".join(own) for key, own in words.items()}
    return found
