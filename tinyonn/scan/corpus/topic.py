"""Topics: conditions for a text to belong to one. Three are built in; others are YAML files with the same keys."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..._io.config import read_yaml
from ..._io.options import integer, number
from ...errors import InputError, did_you_mean, listed, reason, shown


@dataclass(frozen=True)
class Topic:
    """A text belongs when at least `min_matches` different keywords and patterns are found in it, and no `exclude` is.

    A topic without keywords and patterns matches every text.

    Args:
        name: letters, digits, `.`, `_`, `-`; names the corpus file.
        description: one line of text.
        keywords: whole words or phrases, in any case, with their plurals in -s.
        patterns: regular expressions (Python's `re`), each counted once.
        exclude: regular expressions; one match is enough to drop a text.
        min_matches: number of different keywords and patterns required.
        min_density: number of occurrences required per 1,000 characters.
        files: names such as `*.py`: in a folder, these belong without a match.
        code_languages: labels of fenced code blocks that belong; empty for all.

    Raises:
        InputError: a field has the wrong type, or a pattern is not a regular expression.
    """

    name: str
    description: str = ""
    keywords: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_matches: int = 1
    min_density: float = 0.0
    files: tuple[str, ...] = ()
    code_languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise InputError(f"topic must be letters, digits, '.', '_' or '-', got {self.name!r}.")
        if not isinstance(self.description, str):
            raise InputError(f"topic {self.name}: description must be text, got {self.description!r}.")
        for field in _LISTS:
            value = getattr(self, field)
            if isinstance(value, str) or not all(isinstance(entry, str) and entry.strip() for entry in value):
                raise InputError(f"topic {self.name}: {field} must be a list of non-empty strings, got {value!r}.")
            object.__setattr__(self, field, tuple(value))
        integer(1)(self.min_matches, f"topic {self.name}: min_matches")
        number(minimum=0)(self.min_density, f"topic {self.name}: min_density")
        possible = len({keyword.casefold() for keyword in self.keywords}) + len(self.patterns)
        if possible and self.min_matches > possible:
            raise InputError(
                f"topic {self.name}: min_matches must be at most its {possible} keywords and patterns, got {self.min_matches}."
            )
        for field in ("patterns", "exclude"):
            for pattern in getattr(self, field):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise InputError(
                        f"topic {self.name}: {field} must be regular expressions, got {shown(pattern)}: {reason(error, 80)}."
                    ) from None

    @functools.cached_property
    def _keywords(self) -> dict[str, list[tuple[str, re.Pattern[str] | None]]]:
        """Keywords in lower case by their first word (and its plural), with the pattern of those that are more than one plain word."""
        found: dict[str, list[tuple[str, re.Pattern[str] | None]]] = {}
        for folded in dict.fromkeys(" ".join(keyword.casefold().split()) for keyword in self.keywords):
            words = _WORD.findall(folded)
            spaced = r"\s+".join(re.escape(part) for part in folded.split(" "))
            phrase = None if words == [folded] else re.compile(rf"(?<!\w){spaced}s?(?!\w)")
            # A keyword without a word ("++") is looked for in every text: under "".
            triggers = [words[0], words[0] + "s"] if len(words) == 1 else words[:1] or [""]
            for trigger in triggers:
                found.setdefault(trigger, []).append((folded, phrase))
        return found

    @functools.cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(pattern) for pattern in self.patterns]

    def reject(self, text: str) -> str | None:
        """Reason why the text does not belong, or None."""
        if any(re.search(pattern, text) for pattern in self.exclude):
            return "excluded by a pattern"
        if not self.keywords and not self.patterns:
            return None
        counts = self._keyword_counts(text)
        for pattern in self._patterns:
            if self.min_density or len(counts) < self.min_matches:
                hits = sum(1 for _ in pattern.finditer(text)) if self.min_density else int(pattern.search(text) is not None)
                counts += [hits] if hits else []
        if len(counts) < self.min_matches:
            return "off topic"
        return "too thin on the topic" if sum(counts) * 1000 < self.min_density * len(text) else None

    def _keyword_counts(self, text: str) -> list[int]:
        """Number of occurrences of each keyword found."""
        # Only keywords whose first word occurs are searched, so that the time does not grow with their number.
        folded = text.casefold()
        words = Counter(_WORD.findall(folded))
        words[""] = 1
        counts: dict[str, int] = {}
        for word in words.keys() & self._keywords.keys():
            for keyword, phrase in self._keywords[word]:
                if phrase is None:
                    counts[keyword] = counts.get(keyword, 0) + words[word]
                elif keyword not in counts:
                    counts[keyword] = sum(1 for _ in phrase.finditer(folded))
        return [count for count in counts.values() if count]

    def owns_file(self, name: str) -> bool:
        """Whether a file of this name belongs regardless of its text."""
        return any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in self.files)

    def code_blocks(self, text: str) -> list[str]:
        """The fenced code blocks in one of the topic's languages; all of them if it names none."""
        wanted = {language.lower() for language in self.code_languages}
        blocks = []
        for match in _FENCE.finditer(text):
            label = match["label"].split()[0].strip("{}.").lower() if match["label"].split() else ""
            if (not wanted or label in wanted) and match["code"].strip():
                blocks.append(match["code"])
        return blocks


_LISTS = ("keywords", "patterns", "exclude", "files", "code_languages")
_BUILTIN = Path(__file__).parent.parent / "topics"
_WORD = re.compile(r"\w+")
_FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})[ \t]*(?P<label>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)


def builtin_topics() -> list[str]:
    """Names of the topics that come with the package."""
    return sorted(path.stem for path in _BUILTIN.glob("*.yaml"))


def load_topic(name: str) -> Topic:
    """A built-in topic by its name, or one from a YAML file by its path.

    Raises:
        InputError: neither exists, or the file is invalid.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in builtin_topics():
            raise InputError(
                f"topic must be one of {listed(builtin_topics(), 12)} or a YAML file, or come with keywords or patterns, got {name!r}"
                f"{did_you_mean(name, builtin_topics())}"
            )
        path = _BUILTIN / f"{name}.yaml"
    content = read_yaml(path, "topic")
    known = [field.name for field in dataclasses.fields(Topic)]
    for key in content:
        if key not in known:
            raise InputError(f"topic {path}: key must be one of {', '.join(known)}, got {key!r}{did_you_mean(key, known)}")
    values = {key: value for key, value in content.items() if value is not None}
    for key in _LISTS:
        if key in values and not isinstance(values[key], list):
            raise InputError(f"topic {path}: {key} must be a list of non-empty strings, got {shown(values[key])}.")
    return Topic(**{"name": path.stem, **values})
