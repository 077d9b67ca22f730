"""Options of the cut of a corpus."""

from __future__ import annotations

from dataclasses import dataclass

from ..._io.options import MAX_SEED, Options, integer, non_empty, one_of, option, true_or_false
from ...errors import InputError
from .language import LANGUAGES


@dataclass(frozen=True)
class CorpusConfig(Options):
    """Conditions on the texts of a corpus besides its topic, and the part of the source to read.

    Args:
        text_field: field that holds the text.
        format: format of the output; auto keeps chats as they are, text joins their turns, chat drops plain texts.
        code_blocks: fenced code blocks of the topic's languages; keep whole texts, require a block, or keep only the blocks.
        min_chars: minimum length of a text in characters.
        max_chars: maximum length of a text in characters.
        cut: cut longer texts at paragraphs, lines or words, instead of dropping them.
        min_tokens: minimum number of tokens.
        max_tokens: maximum number of tokens.
        language: language to keep, which is detected; drops texts in another or an unknown language.
        dedup: drop texts that equal an earlier one apart from case, spacing and Unicode form.
        limit: size of a random sample of the texts.
        first: with a limit, keep the first texts that pass instead, and stop reading there.
        seed: seed of the sample.
        subset: configuration of a data set on the hub.
        split: split of a data set on the hub.
        skip_bad: count malformed records and unreadable text files, and continue; a folder's files that are not text are always skipped.
        overwrite: replace an existing output.

    Raises:
        InputError: a value is invalid; the message names the field.
    """

    text_field: str | None = option(None, non_empty, "NAME", unset="found")
    format: str = option("auto", one_of("auto", "text", "chat"))
    code_blocks: str = option("keep", one_of("keep", "require", "only"))
    min_chars: int = option(32, integer(0), "N")
    max_chars: int | None = option(None, integer(1), "N")
    cut: bool | None = option(None, true_or_false, unset="text files only")
    min_tokens: int | None = option(None, integer(0), "N")
    max_tokens: int | None = option(None, integer(1), "N")
    language: str | None = option(None, one_of(*LANGUAGES))
    dedup: bool = option(True, true_or_false)
    limit: int | None = option(None, integer(1), "N")
    first: bool = option(False, true_or_false)
    seed: int = option(0, integer(0, MAX_SEED), "N")
    subset: str | None = option(None, non_empty, "NAME")
    split: str = option("train", non_empty, "NAME")
    skip_bad: bool = option(False, true_or_false)
    overwrite: bool = option(False, true_or_false)

    def __post_init__(self) -> None:
        super().__post_init__()
        for unit, least, most in (("chars", self.min_chars, self.max_chars), ("tokens", self.min_tokens, self.max_tokens)):
            if most is not None and most < (least or 0):
                raise InputError(f"max_{unit} must be at least {least}, got {most}.")
        if self.first and self.limit is None:
            raise InputError("first needs a limit, got none.")
        if self.cut and self.max_chars is None:
            raise InputError("cut needs max_chars, got none.")
