"""Short lists of the weights that a scan did not measure. Names that differ only in layer or expert are joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MOST_NAMES = 6
MOST_PARTS = 4  # listed in {}

# Reasons why blocks of a layout hold no value.
NO_TOKEN = "no token was routed to these experts"
NO_VALUE = "their module did not run, or no value was finite"


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """{name: reason} inverted to {reason: names}, the form in the metadata of a file."""
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return found


def describe(reasons: Mapping[str, Iterable[str]], gap: str = ": ", between: str = ", ") -> list[str]:
    """One text per reason, "names: reason", from {reason: names}."""
    return [f"{short_list(names, between)}{gap}{why}" for why, names in reasons.items()]


def short_list(names: Iterable[str], between: str = ", ") -> str:
    """Dotted names, at most MOST_NAMES of them.

    Names that differ only in numbers are joined, with * for the numbers. So are names that differ only in the last part, as in
    "*.mlp.{up,down}". A count follows.
    """
    joined: dict[str, list[str]] = {}
    for name in names:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        joined.setdefault(pattern, []).append(name)
    families: dict[str, list[str]] = {}
    for pattern in joined:
        parent, _, last = pattern.rpartition(".")
        families.setdefault(pattern if last == "*" or not parent else parent, []).append(pattern)
    shown = []
    for parent, patterns in families.items():
        members = [name for pattern in patterns for name in joined[pattern]]
        parts = [pattern.rpartition(".")[2] for pattern in patterns]
        kept = [*parts[:MOST_PARTS], *(["..."] if len(parts) > MOST_PARTS else [])]
        text = patterns[0] if len(patterns) == 1 else f"{parent}.{{{','.join(kept)}}}"
        shown.append(members[0] if len(members) == 1 else f"{text} ({len(members):,})")
    more = [f"{len(shown) - MOST_NAMES:,} more"] if len(shown) > MOST_NAMES else []
    return between.join([*shown[:MOST_NAMES], *more])


def without_value(names: Iterable[str]) -> dict[str, list[str]]:
    """{reason: names} of weights in a layout for which no token has a value."""
    return by_reason({name: NO_TOKEN if name.rpartition(".")[2].isdigit() else NO_VALUE for name in names})
