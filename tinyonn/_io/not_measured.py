"""What a scan did not measure, in few words: names of weights that differ in layer or expert alone are told as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MOST_NAMES = 6

# Why blocks of a layout hold no value.
NO_TOKEN = "no token was routed to these experts"
NO_VALUE = "their module did not run, or no value was finite"


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """{name: why} turned round: {why: names}, as a file's metadata holds it."""
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return found


def told(reasons: Mapping[str, Iterable[str]], gap: str = ": ") -> list[str]:
    """One text a reason, "names: why", from {why: names}."""
    return [f"{short_list(names)}{gap}{why}" for why, names in reasons.items()]


def short_list(names: Iterable[str]) -> str:
    """Dotted names, with * for numbers and a count where that joins several; at most MOST_NAMES of them."""
    joined: dict[str, list[str]] = {}
    for name in names:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        joined.setdefault(pattern, []).append(name)
    shown = [members[0] if len(members) == 1 else f"{pattern} ({len(members):,})" for pattern, members in joined.items()]
    more = [f"{len(shown) - MOST_NAMES:,} more"] if len(shown) > MOST_NAMES else []
    return ", ".join([*shown[:MOST_NAMES], *more])


def without_value(names: Iterable[str]) -> dict[str, list[str]]:
    """{why: names} of weights of a layout that no token left a value in."""
    return by_reason({name: NO_TOKEN if name.rpartition(".")[2].isdigit() else NO_VALUE for name in names})
