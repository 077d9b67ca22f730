"""Texts of a life: documents, chats, the vocabulary, and sequences."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tinyonn.errors import InputError
from tinyonn.life.texts import documents, encoded, learn_tokenizer, split


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    (tmp_path / "b.py").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_text("first")
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "d.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "e.py").write_text("  \n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "f.py").write_text("hidden")
    assert list(documents(str(tmp_path), suffix=".py")) == ["first", "second"]
    assert list(documents(str(tmp_path))) == ["first", "second", "third"]
    assert list(documents(str(tmp_path / "c.txt"))) == ["third"]


def test_records_have_a_text_or_a_chat(tmp_path):
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    file.write_text(
        "\n".join(json.dumps(row) for row in [{"text": "one"}, {"messages": chat}, {"conversations": [{"from": "human", "value": "x"}]}])
    )
    assert list(documents(str(file))) == [
        "one",
        "<|turn|>user\n2 + 2?<|close|>\n<|turn|>assistant\n4<|close|>\n",
        "<|turn|>human\nx<|close|>\n",
    ]
    file.write_text(json.dumps({"body": "two"}))
    assert list(documents(str(file), text_field="body")) == ["two"]


BAD = {
    "no field": ('{"title": "x"}', "record 1 of .* must have a text in 'text' or a chat in 'messages', got the fields title"),
    "a turn without content": ('{"messages": [{"role": "user"}]}', "must have turns with a role and a content, got the fields role"),
    "a turn that is text": ('{"messages": ["hi"]}', "must have turns with a role and a content, got str 'hi'"),
    "half a surrogate pair": ('{"text": "bad \\ud800 end"}', "record 1 of .* must be Unicode text, got half of a surrogate pair"),
    "cut off": ('{"text": "x"}\n{"text', "record 2 of .* must be one JSON object"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_records_are_one_line(content, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        list(documents(str(file)))


def test_a_path_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match=r"data_path must be a file or a folder, got .*, which does not exist"):
        list(documents(str(tmp_path / "none")))
    (tmp_path / "x.bin").write_bytes(b"\xff\x00")
    with pytest.raises(InputError, match="data_path must be UTF-8 text, or records named"):
        list(documents(str(tmp_path / "x.bin")))


TEXTS = ["def f(x):\n    return x + 1\n" * 5, "Grüße, 你好! 🙂 <|end|> is not a token here\t\n", "plain words, plain words"]


def test_every_text_comes_back_from_the_vocabulary(tmp_path):
    tokenizer = learn_tokenizer(TEXTS, 300)
    assert len(tokenizer) <= 300
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "unseen: ☃ ß \x07"]:
        tokens = again(text, add_special_tokens=False)["input_ids"]
        assert again.decode(tokens) == text
    tokens = encoded(TEXTS, again)
    assert tokens.dtype == np.int32
    ends = np.flatnonzero(tokens == again.eos_token_id)
    assert again.decode(tokens[: ends[0]]) == TEXTS[0]
    assert tokens[-1] == again.eos_token_id


def test_a_chat_is_encoded_as_the_tokenizer_renders_it(tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": chat}))
    tokenizer = learn_tokenizer(TEXTS, 300)
    (text,) = documents(str(file))
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text


def test_sequences_are_split_without_overlap():
    tokens = np.arange(103, dtype=np.int32)
    training, held_out = split(tokens, 10, 3, "texts")
    assert (len(training), len(held_out)) == (7, 3)
    every = torch.cat([part[place]["input_ids"] for part in (training, held_out) for place in range(len(part))])
    assert sorted(every.tolist()) == list(range(100))
    assert [int(held_out[place]["input_ids"][0]) for place in range(3)] == [0, 40, 90]
    with pytest.raises(InputError, match=r"data_path must have more than 100 tokens, eval_size times context, got 103 in texts"):
        split(tokens, 10, 10, "texts")
