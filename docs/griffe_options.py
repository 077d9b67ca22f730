"""Extension of the API reference: defaults of options, and names that share a line of a docstring.

A field made by `tinyonn._io.options.option` shows its default only. In "query, key: (B, T)" griffe would read a name and a type.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"( *)(Args|Attributes|Raises|Returns):")
JOINED = re.compile(r"\*{0,2}\w+(?:(?:, | … )\*{0,2}\w+)+(?=: )")  # "query, key", "compress_size … impl"
RESULT = re.compile(r"\w+: ")
SPACE = "\N{NO-BREAK SPACE}"


class OptionDefaults(griffe.Extension):
    """Replaces `option(default, ...)`, the value of a field, by `default`; a required field has none."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
            default = value.arguments[0]
            attr.value = None if str(default) == "REQUIRED" else default


class JoinedNames(griffe.Extension):
    """Keeps names together that share a line of a section, and results of one function apart."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(docstring: str) -> str:
    """The docstring as griffe reads it right.

    Parameters that share a line have no spaces between them, attributes that share a line get one each, errors become a union, and several
    results become a list.
    """
    lines: list[str] = []
    results: list[int] = []  # lines that begin a named result
    section, indent = "", ""
    attributes: list[str] = []
    first = 0  # line with the description that the attributes share

    for line in [*docstring.split("\n"), "end"]:
        text = line.strip()
        depth = len(indent_of(line))
        title = SECTION.fullmatch(line)
        entry = bool(text) and bool(section) and depth == len(indent) + 4
        if attributes and (entry or (text and depth <= len(indent))):
            rest = lines[first + 1 :]
            lines[first:] = [line for name in attributes for line in (f"{indent}    {name}{lines[first]}", *rest)]
            attributes = []
        if title:
            indent, section = title[1], title[2]
        elif text and depth <= len(indent):
            section = ""
        elif entry and (joined := JOINED.match(text)):
            names, rest_of_line = joined[0].replace(" … ", f"{SPACE}…{SPACE}"), text[joined.end() :]
            if section == "Attributes":
                attributes, first, line = names.split(", "), len(lines), rest_of_line
            else:
                names = names.replace(", ", " | " if section == "Raises" else f",{SPACE}")
                line = f"{indent}    {names}{rest_of_line}"
            if section == "Returns":
                results.append(len(lines))
        elif entry and section == "Returns" and RESULT.match(text):
            results.append(len(lines))
        lines.append(line)
    lines.pop()
    if len(results) > 1:
        for at in results:
            names, _, description = lines[at].strip().partition(": ")
            shown = names.replace(f",{SPACE}", "`, `").replace(f"{SPACE}…{SPACE}", "` … `")
            lines[at] = f"{indent_of(lines[at])}- `{shown}`: {description}"
        lines.insert(results[0], f"{indent_of(lines[results[0]])}A tuple of\n")
    return "\n".join(lines)


def indent_of(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]
