"""Chats with tool calls, as they are published, through `scan` and `corpus`; and tokenizers that are not their model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tinyonn.mscan import MscanReader
from tinyonn.testing import save_tiny_model

from .conftest import Cli, one_line

# Written as the templates of Qwen and Hermes are.
TEMPLATE = (
    "{% if tools %}TOOLS {% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}"
    "{% if m.name %} from {{ m.name }}{% endif %}{{ '\\n' }}{% endfor %}"
)
# As that of DeepSeek, which joins the arguments as text.
TEXT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + ' ' + call.function.arguments + '</call>' }}{% endfor %}{{ '\\n' }}{% endfor %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
]
ARGUMENTS = {"city": "Ulm", "days": 2}


def chat(arguments: Any, **record: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Rain in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes."},
    ]
    return {"id": "a", "messages": turns, "tools": TOOLS, **record}


SPELLED = """TOOLS weather
user: Rain in Ulm?
assistant: <call>weather {"city": "Ulm", "days": 2}</call>
tool: {"rain": true} from weather
assistant: Yes.
"""
LEGACY = {
    "id": "a",
    "messages": [
        {"role": "user", "content": "Rain in Ulm?"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
        {"role": "function", "name": "weather", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes."},
    ],
    "tools": json.dumps(TOOLS),
}
SHARED = {
    "id": "a",
    "conversations": [
        {"from": "human", "value": "Rain in Ulm?"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
        {"from": "observation", "value": '{"rain": true}', "name": "weather"},
        {"from": "gpt", "value": "Yes."},
    ],
    "tools": json.dumps(TOOLS),
}


def scanned_text(cli: Cli, tmp_path: Path, record: dict[str, Any], template: str) -> str:
    model = save_tiny_model(tmp_path / "model", chat_template=template, max_position_embeddings=512)
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    ran = cli("scan", "-m", model, "-d", tmp_path / "d.jsonl", "-o", tmp_path / "o.mscan", "--max-length", 500)
    assert ran.code == 0, ran.err
    with MscanReader(tmp_path / "o.mscan") as reader:
        return str(reader.sequences[0].text)


@pytest.mark.parametrize(
    "record",
    [chat(ARGUMENTS), chat(json.dumps(ARGUMENTS)), LEGACY, SHARED],
    ids=["object", "OpenAI's JSON", "function_call", "ShareGPT"],
)
def test_every_spelling_of_a_call_gives_the_templates_text(cli: Cli, tmp_path: Path, record: dict[str, Any]) -> None:
    assert scanned_text(cli, tmp_path, record, TEMPLATE) == SPELLED


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
def test_a_template_that_joins_text_gets_text(cli: Cli, tmp_path: Path, arguments: Any) -> None:
    text = scanned_text(cli, tmp_path, chat(arguments), TEXT_TEMPLATE)
    assert '<call>weather {"city": "Ulm", "days": 2}</call>' in text


def test_a_template_that_drops_calls_is_refused(cli: Cli, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", chat_template=PLAIN_TEMPLATE)
    plain = {"id": "b", "messages": [{"role": "user", "content": "hi there"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(chat(ARGUMENTS)) + "\n" + json.dumps(plain) + "\n")
    given = ["scan", "-m", model, "-d", tmp_path / "d.jsonl", "-o", tmp_path / "o.mscan"]
    one_line(cli(*given), "template takes, got a: it leaves out the tool calls", "--skip-bad", command="tinyonn scan")
    ran = cli(*given, "--skip-bad")
    assert ran.code == 0, ran.err
    assert "1 refused by the chat template" in ran.out


def test_a_corpus_keeps_calls_and_tools(cli: Cli, tmp_path: Path) -> None:
    source, out = tmp_path / "s.jsonl", tmp_path / "c.jsonl"
    source.write_text(json.dumps(chat(json.dumps(ARGUMENTS))) + "\n")
    assert cli("corpus", source, "-t", "any", "--keyword", "Ulm", "-o", out).code == 0
    record = json.loads(out.read_text())
    assert record["tools"] == TOOLS
    assert record["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert scanned_text(cli, tmp_path, record, TEMPLATE) == SPELLED
    text = cli("corpus", source, "-t", "days", "--keyword", "days", "--format", "text", "-o", tmp_path / "t.jsonl")
    assert text.code == 0, text.err  # what is asked for stands in the call alone
    assert '"city": "Ulm"' in json.loads((tmp_path / "t.jsonl").read_text())["text"]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": None}, "messages[0] must have role and content as text"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[0] must have role and content as text"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "messages[0].tool_calls[0] must be a call with the name of a function",
        ),
        ({"role": "assistant", "content": "x", "tool_calls": {"a": 1}}, "messages[0].tool_calls must be a list"),
    ],
    ids=["null", "no calls", "no name", "no list"],
)
def test_malformed_calls_are_named(cli: Cli, model: Path, tmp_path: Path, turn: dict[str, Any], message: str) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [turn]}) + "\n")
    ran = cli("scan", "-m", model, "-d", tmp_path / "d.jsonl", "-o", tmp_path / "o.mscan")
    one_line(ran, message, "d.jsonl, line 1", command="tinyonn scan")


HALF = "\ud83d"  # of a surrogate pair, which JSON can spell and no tokenizer takes


@pytest.mark.parametrize(
    ("record", "where"),
    [
        ({"messages": [{"role": HALF, "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x", "name": HALF}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": HALF}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": HALF, "function": {"name": "f"}}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": HALF}}]}, "tools"),
    ],
    ids=["role", "name", "tool_call_id", "call's id", "tools"],
)
@pytest.mark.parametrize("command", ["scan", "corpus"])
def test_half_a_surrogate_pair_is_named_wherever_it_stands(
    cli: Cli, model: Path, tmp_path: Path, record: dict[str, Any], where: str, command: str
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    given = ["-m", model, "-d", tmp_path / "d.jsonl"] if command == "scan" else [tmp_path / "d.jsonl", "-t", "any", "--everything"]
    ran = cli(command, *given, "-o", tmp_path / ("o.mscan" if command == "scan" else "o.jsonl"))
    one_line(ran, f"{where} must be valid Unicode, got a lone surrogate in", "d.jsonl, line 1", command=f"tinyonn {command}")


def test_a_tokenizer_of_another_model_names_folder_and_record(cli: Cli, model: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(model, tmp_path / "mixed"))
    small = save_tiny_model(tmp_path / "small", vocab_size=80)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(small / name, mixed / name)
    (tmp_path / "d.jsonl").write_text('{"id": "r1", "text": "ABC"}\n{"id": "r2", "text": "abc~"}\n')
    ran = cli("scan", "-m", mixed, "-d", tmp_path / "d.jsonl", "-o", tmp_path / "o.mscan")
    one_line(ran, "the model's 80 tokens", str(mixed), "token id 94 for r2", command="tinyonn scan")
