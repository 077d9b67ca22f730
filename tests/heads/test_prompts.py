"""Which tokens are the question: judged by decoding them, with tokenizers of four kinds trained here."""

from __future__ import annotations

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinyonn.errors import InputError
from tinyonn.heads.fields import Fields
from tinyonn.heads.score.prompts import EncodedPrompt, Prompt, PromptBatch, PromptEncoder, PromptTemplate, render_all

QUESTION = Fields("Where do übertired {people} go, 🦉 owls?", "They sleep.", ("A", "B"), ("to bed", "to {question}"), 0)
CORPUS = [
    "Question: Where do people go? Choices: A. to bed B. out Answer:",
    "The owls of Athens are übertired",
    "do the question to the bed",
]


def byte_level(trim_offsets: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_pieces() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.train_from_iterator(CORPUS * 4, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


def sentence_pieces() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    """A token is a run without a space, and each space: "Q:Where" is one token of the marker and the question."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", " ", "Q:Where", "do", "Where"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {
    "byte-level": lambda: byte_level(False),
    "byte-level-trimmed": lambda: byte_level(True),
    "word-pieces": word_pieces,
    "sentence-pieces": sentence_pieces,
}


def letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def test_the_default_prompt_is_written_out():
    plain = Fields("Who?", None, ("A", "B"), ("me", "you"), None)
    with_context, without = render_all([QUESTION, plain])
    assert without == Prompt("Question: Who?\nChoices:\nA. me\nB. you\nAnswer:", 10, 14)
    assert with_context.text.startswith("Context: They sleep.\nQuestion: Where do ")
    assert with_context.text[with_context.start : with_context.end] == QUESTION.question


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}", QUESTION.question),
        ("{{q}} {question} {{}}", f"{{q}} {QUESTION.question} {{}}"),
        ("{choices}\n{question}\n{context}", f"A. to bed\nB. to {{question}}\n{QUESTION.question}\nThey sleep."),
    ],
)
def test_a_template_gives_its_text_and_the_place_of_the_question(template, text):
    (prompt,) = render_all([QUESTION], PromptTemplate(template))
    assert prompt.text == text
    assert prompt.text[prompt.start : prompt.end] == QUESTION.question


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Question: {choices}", "must have the place {question}, got choices."),
        ("no place", "must have the place {question}, got no place."),
        ("{question} {question}", "must have {question} once, got it 2 times."),
        ("{question} {choises}", "must have no other places than {question}, {choices}, {context}, got {choises}; did you mean 'choices'?"),
        ("{question!r}", "got {question!r}"),
        ("{question:>9}", "must have places without a format"),
        ("{question} {", "must write a brace that is text twice ({{ or }})"),
    ],
)
def test_a_wrong_template_is_refused(tmp_path, template, message):
    path = tmp_path / "prompt.txt"
    path.write_text(template)
    with pytest.raises(InputError, match=re.escape(f"prompt_template {path} {message}" if not message.startswith("got") else message)):
        PromptTemplate.from_file(str(path))


def test_a_template_file_may_end_in_a_line_break_and_must_be_there(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Q: {question}\n\n")
    assert PromptTemplate.from_file(str(path)).render(QUESTION).text == f"Q: {QUESTION.question}\n"
    with pytest.raises(InputError, match=r"prompt_template must be a readable file, got .*none.txt: No such file or directory."):
        PromptTemplate.from_file(str(tmp_path / "none.txt"))


def test_a_template_with_context_refuses_data_without():
    with pytest.raises(InputError, match=r"must not have \{context\} for data without one, got a question without: 'Who\?'"):
        render_all([Fields("Who?", None, ("A",), ("me",), None)], PromptTemplate("{context} {question}"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_the_question_spell_the_question(kind):
    tokenizer = KINDS[kind]()
    (prompt,) = render_all([QUESTION])
    encoded = PromptEncoder(tokenizer, 512).encode(prompt)
    assert not encoded.truncated
    assert list(encoded.token_ids) == tokenizer(prompt.text)["input_ids"]
    inside = [token for token, belongs in zip(encoded.token_ids, encoded.span or (), strict=True) if belongs]
    spelled = tokenizer.decode(inside)
    if kind.startswith("byte"):
        assert spelled.strip() == QUESTION.question
    else:  # what the vocabulary lacks is one unknown token, lost to decoding; letters that it has come back
        known = letters(tokenizer.decode(tokenizer(QUESTION.question, add_special_tokens=False)["input_ids"]))
        assert letters(spelled) == known
        assert known.startswith("wheredo")


def test_a_leading_space_goes_with_the_token_that_holds_it():
    tokenizer = byte_level(False)
    prompt = Prompt("a do b", 2, 4)
    encoded = PromptEncoder(tokenizer, 64).encode(prompt)
    assert " do" in [tokenizer.decode([token]) for token in encoded.token_ids]
    assert tokenizer.decode([token for token, inside in zip(encoded.token_ids, encoded.span or (), strict=True) if inside]) == " do"


def test_a_token_of_marker_and_question_belongs_to_both():
    encoded = PromptEncoder(words(), 64).encode(Prompt("x Q:Where do y", 4, 12))
    assert encoded.token_ids == (0, 1, 2, 1, 3, 1, 0)
    assert encoded.span == (False, False, True, True, True, False, False)


@pytest.mark.parametrize(
    ("max_length", "kept"),
    [(7, True), (6, True), (5, True), (4, False), (3, False), (2, False)],
    ids=["fits", "choices-cut", "just-whole", "partly-cut", "more-cut", "wholly-cut"],
)
def test_a_question_that_was_cut_is_lost(max_length, kept):
    encoded = PromptEncoder(words(), max_length).encode(Prompt("x Q:Where do y", 4, 12))
    assert (encoded.span is not None) == kept
    assert encoded.truncated == (max_length < 7)
    assert len(encoded.token_ids) == max_length


def whole_text(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, max_length: int) -> EncodedPrompt:
    """All tokens of the prompt, cut here: what is left when the special tokens have their room, and whether the question is in it."""
    found = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = found["input_ids"], found["offset_mapping"]
    ends = tokenizer("")["input_ids"]
    assert len(ends) in (0, 2)
    room = max_length - len(ends)
    inside = [start < prompt.end and end > prompt.start for start, end in places]
    span = [*([False] if ends else []), *inside[:room], *([False] if ends else [])]
    whole = any(inside[:room]) and not any(inside[room:])
    return EncodedPrompt((*ends[:1], *ids[:room], *ends[1:]), tuple(span) if whole else None, len(ids) > room)


FILLER = "Where do people go? The owls of Athens are übertired, 🦉 in bed. "
LONG = {
    "question first": (Prompt(FILLER * 400, 0, 40), (5, 16, 64)),
    "question within": (Prompt(FILLER * 400, 30, 90), (16, 40, 64)),
    "question far": (Prompt(FILLER * 400, 20_000, 20_040), (16, 64)),
    "long question": (Prompt("Q: " + FILLER * 400, 3, 3 + len(FILLER) * 400), (16, 64)),
    "one word": (Prompt("Where " + "a" * 5000 + " do owls go", 0, 5), (4, 8)),
    "one word, question after": (Prompt("Where " + "a" * 5000 + " do owls go", 5007, 5017), (8, 64)),
    "short": (Prompt("Where do owls go to bed", 6, 13), (5, 9, 64)),
}


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-trimmed", "word-pieces"])
@pytest.mark.parametrize("text", LONG)
def test_a_long_text_gives_what_all_of_its_tokens_would(kind, text):
    tokenizer, (prompt, lengths) = KINDS[kind](), LONG[text]
    for max_length in lengths:
        assert PromptEncoder(tokenizer, max_length).encode(prompt) == whole_text(tokenizer, prompt, max_length)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_very_long_question_only_the_beginning_is_tokenized(kind, monkeypatch):
    tokenizer, read = KINDS[kind](), []
    call = type(tokenizer).__call__

    def counting(self: PreTrainedTokenizerFast, text: str, **options: object) -> object:
        read.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    text = FILLER * 20_000
    encoded = PromptEncoder(tokenizer, 16).encode(Prompt(text, 0, len(text)))
    assert (len(encoded.token_ids), encoded.span, encoded.truncated) == (16, None, True)
    assert sum(read) < 20_000 < len(text)


def test_special_tokens_take_their_room_and_are_no_question():
    tokenizer = word_pieces()
    prompt = Prompt("where do people go", 0, 18)
    whole = PromptEncoder(tokenizer, 64).encode(prompt)
    length = len(whole.token_ids)
    assert whole.span == (False, *[True] * (length - 2), False)
    cut = PromptEncoder(tokenizer, length - 1).encode(prompt)
    assert cut.token_ids == (*whole.token_ids[: length - 2], whole.token_ids[-1])
    assert cut.truncated
    assert cut.span is None


def test_a_tokenizer_that_cuts_on_the_left_is_made_to_cut_on_the_right():
    tokenizer = words()
    tokenizer.truncation_side = "left"
    assert PromptEncoder(tokenizer, 5).encode(Prompt("x Q:Where do y", 4, 12)).token_ids == (0, 1, 2, 1, 3)


def test_a_question_without_a_token_is_lost():
    tokenizer = word_pieces()
    encoded = PromptEncoder(tokenizer, 64).encode(Prompt("go \u200b go", 3, 4))  # the normaliser drops it
    assert encoded == EncodedPrompt(tuple(tokenizer("go \u200b go")["input_ids"]), None, False)


def test_a_slow_tokenizer_is_refused_by_name():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(InputError, match=r"must hold a fast tokenizer .*got SlowTokenizer."):
        PromptEncoder(SlowTokenizer(), 64)


def test_a_length_without_room_for_text_is_refused():
    with pytest.raises(InputError, match=r"max_length must be more than the 2 special tokens of each text, got 2."):
        PromptEncoder(word_pieces(), 2)


def test_a_batch_puts_padding_last():
    prompts = [EncodedPrompt((5, 6, 7), (False, True, True), False), EncodedPrompt((8,), None, True)]
    batch = PromptBatch.of(prompts, 9)
    assert torch.equal(batch.input_ids, torch.tensor([[5, 6, 7], [8, 9, 9]]))
    assert torch.equal(batch.attention_mask, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch.span_mask, torch.tensor([[False, True, True], [False, False, False]]))
