"""What runs are called beside each other: by what differs between them, and by nothing else."""

from collections.abc import Mapping, Sequence

MOST_KEYS = 3  # that a label names, where fewer would do to tell all runs apart


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys that don't have one value in all that have them, in their order; what a run of an earlier version lacks is no
    difference."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({each[key] for each in settings if key in each}) > 1]


def labels(settings: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """A label for each run: "loss.beta=0.1, optimizer.lr=0.0003". Runs of equal settings have equal ones.

    Where more keys than MOST_KEYS differ, those that are named tell all settings apart, in the order of the keys: of runs that
    differ in the loss, and in the numbers that go with it, the loss is named. The key "" stands for its value alone. `names`:
    what a run is called of whose settings nothing is to be said.
    """
    keys = differing(settings)
    named = keys if len(keys) <= MOST_KEYS else _telling(settings, keys)
    made = []
    for each, name in zip(settings, names, strict=True):
        parts = [f"{key}={each[key]}" if key else each[key] for key in named if key in each]
        made.append(", ".join(parts) or name)
    return made


def _telling(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """Of the keys, in their order, those by which more settings are told apart than by the ones before."""
    named: list[str] = []
    for key in keys:
        if _groups(settings, [*named, key]) > _groups(settings, named):
            named.append(key)
    return named


def _groups(settings: Sequence[Mapping[str, str]], keys: Sequence[str]) -> int:
    return len({tuple(each.get(key) for key in keys) for each in settings})
