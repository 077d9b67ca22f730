"""Conversion of records of a text data set to plain texts or chats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from ..._io.records import BadRecordError, field_names, short

# Fields to look for, in this order, if the caller names none. The pairs become a chat of two turns.
TEXT_FIELDS = ("text", "content")
CHAT_FIELDS = ("messages", "conversations")
PAIR_FIELDS = (
    (("prompt",), ("completion", "response", "answer", "output")),
    (("instruction", "question"), ("output", "response", "answer", "completion")),
)
# What belongs to an `instruction` or `question`, before it and after it.
ASKED_BEFORE = ("context", "passage")
ASKED_AFTER = ("input", "options")
MAX_ID_BYTES = 65536  # what a .mscan file takes
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
# What chat templates read of a turn besides role, content and tool calls.
_TURN_FIELDS = ("name", "tool_call_id")


@dataclass(frozen=True)
class CorpusItem:
    """One sequence to scan.

    Args:
        sequence_id: `id` of the record, or one made from its content; unique in its corpus.
        text: plain text, or None.
        messages: chat of `{"role": ..., "content": ...}` turns, or None. Exactly one of the two is given. A turn of the assistant may
            have `tool_calls`, `{"type": "function", "function": {"name": ..., "arguments": {...}}}` each.
        tools: schemas of the functions that the chat may call, or None.
    """

    sequence_id: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None

    @property
    def content(self) -> str:
        """The whole text; blank lines join the turns of a chat."""
        if self.text is not None:
            return self.text
        return "\n\n".join(_turn_text(turn) for turn in self.messages or ())


def item_from_record(record: Mapping[str, Any], *, text_field: str | None = None) -> CorpusItem:
    """Text or chat of one record; its `sequence_id` is the record's `id`, or empty.

    Without `text_field`: `text` or `content` is plain text; `messages` or `conversations` a chat; `prompt` with `completion`, and
    `instruction` or `question` with `output` or `answer`, a chat of two turns, after `system` if that is there. A `context` or `passage`
    goes before the question, `input` or `options` after it.

    Turns may call tools: `tool_calls` (or `function_call`) with a content that may be null, answered by turns of the role `tool`; arguments
    written as a JSON string become an object. `tools` of the record holds their schemas.

    Raises:
        BadRecordError: the field is missing (the message lists the record's fields), the text is empty, or the chat is malformed.
    """
    identity = record.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == ""):
        raise BadRecordError(f"id must be a non-empty string or a whole number, got {short(identity)}")
    name = "" if identity is None else _sound(str(identity), "id")
    if len(name.encode()) > MAX_ID_BYTES:
        raise BadRecordError(f"id must take at most {MAX_ID_BYTES} bytes, got {len(name.encode())}")
    if text_field is not None:
        if text_field not in record:
            raise BadRecordError(f"must have the field {text_field!r}, its fields are {field_names(record)}")
        value = record[text_field]
        if isinstance(value, list):
            return CorpusItem(name, messages=_chat(value, text_field), tools=_tools(record))
        return CorpusItem(name, text=_text(value, text_field))
    for field in TEXT_FIELDS:
        if record.get(field) is not None:
            return CorpusItem(name, text=_text(record[field], field))
    for field in CHAT_FIELDS:
        if record.get(field) is not None:
            return CorpusItem(name, messages=_chat(record[field], field), tools=_tools(record))
    for questions, answers in PAIR_FIELDS:
        question = next((field for field in questions if record.get(field) is not None), None)
        if question is not None:
            return _pair(name, record, question, next((field for field in answers if record.get(field)), None))
    expected = ", ".join((*TEXT_FIELDS, *CHAT_FIELDS, "prompt", "instruction", "question"))
    raise BadRecordError(f"must have one of the fields {expected}, its fields are {field_names(record)}")


def content_id(item: CorpusItem, taken: Container[str] = ()) -> str:
    """An identity from the content alone, so that lines added before it do not change it. A repetition gets `-2`, `-3`, …"""
    raw = item.text if item.messages is None else repr([(turn["role"], turn["content"], *_calls_text(turn)) for turn in item.messages])
    name = digest = hashlib.blake2b(str(raw).encode("utf-8"), digest_size=8).hexdigest()
    copies = 1
    while name in taken:
        copies += 1
        name = f"{digest}-{copies}"
    return name


def _pair(name: str, record: Mapping[str, Any], question: str, answer: str | None) -> CorpusItem:
    asked, answered = record[question], None if answer is None else record[answer]
    if isinstance(asked, list):  # prompt and completion may be chats themselves
        turns = [*asked, *answered] if isinstance(answered, list) else asked
        return CorpusItem(name, messages=_chat(turns, question), tools=_tools(record))
    asked = _text(asked, question)
    if question != "prompt":
        parts = [record.get(field) for field in ASKED_BEFORE] + [asked] + [record.get(field) for field in ASKED_AFTER]
        asked = "\n\n".join(_sound(part.strip("\n"), question) for part in parts if isinstance(part, str) and part.strip())
    if answer is None and question == "prompt":  # a bare prompt is text to go on from
        return CorpusItem(name, text=asked)
    turns = [{"role": "user", "content": asked}]
    if isinstance(record.get("system"), str) and record["system"].strip():
        turns.insert(0, {"role": "system", "content": _sound(record["system"], "system")})
    if answer is not None:
        turns.append({"role": "assistant", "content": _text(answered, answer)})
    return CorpusItem(name, messages=turns)


def _chat(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"{field} must be a non-empty list of turns, got {short(value)}")
    turns = []
    for index, turn in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(turn, Mapping):
            raise BadRecordError(f"{where} must be an object with role and content, got {short(turn)}")
        turns.append(_turn(turn, where))
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        raise BadRecordError(f"{field} must hold some text, got only empty turns")
    return turns


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if role == "function_call":  # a turn that is a call, written out as JSON
        role, calls, content = "assistant", [content], ""
    if isinstance(content, list):  # parts, of which the text counts
        content = "".join(part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str))
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRecordError(f"{where} must have role and content as text, its fields are {field_names(turn)}")
    found: dict[str, Any] = {"role": ROLES.get(role, role), "content": _sound(content, where)}
    found |= {name: turn[name] for name in _TURN_FIELDS if isinstance(turn.get(name), str)}
    if calls:
        if not isinstance(calls, list):
            raise BadRecordError(f"{where}.tool_calls must be a list, got {short(calls)}")
        found["tool_calls"] = [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]
    _sound_json(found, where)  # a template may write any of it: role, name, ids, arguments
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call as transformers' chat templates take it: arguments are an object where they are one, whether or not written as JSON."""
    call = _parsed(call)
    function = _parsed(call.get("function", call)) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRecordError(f"{where} must be a call with the name of a function, got {short(call)}")
    arguments = _parsed(function.get("arguments", {}))
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    tools = _parsed(record.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRecordError(f"tools must be a list of functions' schemas, got {short(tools)}")
    _sound_json(tools, "tools")
    return tools


def _parsed(value: Any) -> Any:
    """The object or list that a string spells in JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (dict, list)) else value


def _calls_text(turn: Mapping[str, Any]) -> list[str]:
    return [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]


def _turn_text(turn: Mapping[str, Any]) -> str:
    """The whole text of a turn, including its calls."""
    return "\n".join([*([turn["content"]] if turn["content"] else []), *_calls_text(turn)])


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(f"{field} must be text, got {short(value)}")
    if not value.strip():
        raise BadRecordError(f"{field} must not be empty")
    return _sound(value, field)


def _sound(value: str, field: str) -> str:
    # JSON may spell half of a surrogate pair; no tokenizer and no file takes it.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(f"{field} must be valid Unicode, got a lone surrogate at character {error.start}") from None
    return value


def _sound_json(value: Any, field: str) -> None:
    """Raises BadRecordError where any string within holds half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        found = error.object[max(0, error.start - 20) : error.start + 10]
        raise BadRecordError(f"{field} must be valid Unicode, got a lone surrogate in {short(found)}") from None
