"""`tinyonn corpus`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._io.folders import VOCABULARY_FILES, has_tokenizer, tokenizer_fault
from .._io.hub import SMALL_FILES, hub_folder, is_hub_id
from ..errors import InputError
from . import screen

if TYPE_CHECKING:
    from ..scan.corpus.build import CorpusProgress, CorpusReport
    from ..scan.corpus.topic import Topic


def corpus(
    source: Annotated[
        str,
        typer.Argument(help="JSONL, JSON, text (also .gz, .zst) or Parquet file, folder, data set on the hub, or -.", show_default=False),
    ],
    topic: Annotated[
        str,
        typer.Option("--topic", "-t", metavar="NAME|FILE", help="python, finance, math, a YAML file, or a new name.", show_default=False),
    ],
    output_path: Annotated[
        Path | None,
        typer.Option("--output-path", "-o", metavar="PATH", help="The corpus. [default: data/sft/TOPIC_corpus.jsonl]", show_default=False),
    ] = None,
    keyword: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A word or phrase of the topic; may be repeated.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(metavar="REGEX", help="A regular expression of the topic; may be repeated.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="A regular expression of texts to drop; may be repeated.")
    ] = None,
    min_matches: Annotated[
        int | None, typer.Option(metavar="N", help="Minimum number of different keywords and patterns.", show_default=False)
    ] = None,
    min_density: Annotated[
        float | None, typer.Option(metavar="X", help="Minimum number of matches per 1,000 characters.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Skip the test of topic, and apply only the other limits.")] = False,
    text_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field that holds the text. [default: found]", show_default=False)
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="auto|text|chat",
            help="Format of the output: auto keeps chats as they are, text joins their turns, chat drops plain texts.",
        ),
    ] = "auto",
    code_blocks: Annotated[
        str,
        typer.Option(metavar="keep|require|only", help="Fenced code blocks: keep whole texts, require a block, or keep only the blocks."),
    ] = "keep",
    min_chars: Annotated[int, typer.Option(metavar="N", help="Minimum length of a text.")] = 32,
    max_chars: Annotated[int | None, typer.Option(metavar="N", help="Maximum length of a text.", show_default=False)] = None,
    cut: Annotated[
        bool | None,
        typer.Option("--cut/--no-cut", help="Cut longer texts at paragraphs, instead of dropping them. [default: text files only]"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Tokenizer for --min-tokens and --max-tokens: a folder or a name on the hub.", show_default=False
        ),
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(metavar="N", help="Minimum number of tokens.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Maximum number of tokens.", show_default=False)] = None,
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="Language to keep, which is detected (en, de, fr, zh, ...).", show_default=False)
    ] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup/--no-dedup", help="Drop texts that differ from an earlier one only in case and spacing.")
    ] = True,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Size of a random sample of the texts.", show_default=False)] = None,
    first: Annotated[bool, typer.Option("--first", help="With --limit: keep the first N texts that pass, and stop reading.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sample.")] = 0,
    subset: Annotated[str | None, typer.Option(metavar="NAME", help="Configuration of a data set on the hub.", show_default=False)] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of a data set on the hub.")] = "train",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count malformed records and continue.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Select a corpus on one topic from a large source.

    Writes JSONL, and prints the number of texts kept, and of texts dropped by reason.
    """
    from ..scan.corpus.corpus import build_corpus

    changes = {"min_matches": min_matches, "min_density": min_density}
    about = _topic(
        topic, keyword or [], pattern or [], exclude or [], everything, {key: value for key, value in changes.items() if value is not None}
    )
    with screen.Progress(f"corpus of {about.name}") as bar:
        report = build_corpus(
            source,
            about,
            output_path,
            text_field=text_field,
            format=format,
            code_blocks=code_blocks,
            min_chars=min_chars,
            max_chars=max_chars,
            cut=cut,
            tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            language=language,
            dedup=dedup,
            limit=limit,
            first=first,
            seed=seed,
            subset=subset,
            split=split,
            skip_bad=skip_bad,
            overwrite=overwrite,
            progress=lambda state: show_progress(bar, state),
        )
    print(_report_screen(report))


def show_progress(bar: screen.Progress, state: CorpusProgress) -> None:
    bar.update(state.fraction, f"{screen.number(state.read)} read, {screen.number(state.kept)} kept")


def _topic(name: str, keywords: list[str], patterns: list[str], exclude: list[str], everything: bool, changes: dict[str, Any]) -> Topic:
    """The named topic, or a new one of that name, with the keywords and patterns of the command line."""
    from ..scan.corpus.topic import Topic, builtin_topics, load_topic

    known = name in builtin_topics() or name.endswith((".yaml", ".yml"))
    if everything and (keywords or patterns or changes):
        raise InputError("--everything cannot be combined with --keyword, --pattern, --min-matches or --min-density.")
    topic = load_topic(name) if known or not (keywords or patterns or everything) else Topic(name)
    if everything:
        changes, topic = {"min_matches": 1, "min_density": 0.0}, dataclasses.replace(topic, keywords=(), patterns=(), min_matches=1)
    return dataclasses.replace(
        topic,
        keywords=(*topic.keywords, *keywords),
        patterns=(*topic.patterns, *patterns),
        exclude=(*topic.exclude, *exclude),
        **changes,
    )


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    rule, folder = "tokenizer must be a folder with a tokenizer or a name on the hub", Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(name):
            raise InputError(f"{rule}, got {name}.")
        found = hub_folder(name, rule, SMALL_FILES, has_tokenizer)
        if found is None:
            raise InputError(f"{rule}, got {name}, which has none of {', '.join(VOCABULARY_FILES)}.")
        folder = found
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many types of errors for a damaged file
        raise InputError(f"{rule}, got {name}: {tokenizer_fault(folder, error)}") from error


def _report_screen(report: CorpusReport) -> str:
    mean = report.characters // report.kept
    lines: list[tuple[str, object]] = [
        ("read", f"{screen.counted(report.read, 'record')} in {screen.duration(report.seconds)}"),
        (
            "kept",
            f"{screen.counted(report.kept, 'sequence')}, {screen.counted(report.characters, 'character')} ({screen.number(mean)} each)",
        ),
    ]
    if report.dropped:
        width = max(len(screen.number(count)) for count in report.dropped.values())
        reasons = "\n".join(f"{screen.number(count):>{width}}  {reason}" for reason, count in report.dropped.items())
        lines.append(("dropped", reasons))
    lines += [("malformed" if index == 0 else "", error) for index, error in enumerate(report.errors)]
    return screen.rows([*lines, ("written", report.output)])
