"""Which examples a page shows: chosen by hash, so that nobody picks, and the same every time."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def by_hash(items: Iterable[Item], key: Callable[[Item], str], count: int) -> list[Item]:
    """The `count` items whose keys have the smallest SHA-256: a random draw that depends on the keys alone."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())[:count]


def quotas(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` places shared out in proportion to `sizes` by largest remainder; a group that exists gets at least one if it can."""
    total = sum(sizes.values())
    if total <= count:
        return dict(sizes)
    exact = {name: count * size / total for name, size in sizes.items()}
    given = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: (given[name] - exact[name], name))[: count - sum(given.values())]:
        given[name] += 1
    for name in sorted(name for name, size in sizes.items() if size and not given[name]):
        richest = max(given, key=lambda other: (given[other], other))
        if given[richest] > 1:
            given[richest] -= 1
            given[name] += 1
    return given


def thin(values: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the values, evenly spread, first and last included."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
