"""`tinyonn corpus`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._io.folders import VOCABULARY_FILES, has_tokenizer, tokenizer_fault
from .._io.hub import SMALL_FILES, hub_folder, is_hub_id
from ..errors import InputError
from ..scan.corpus.config import CorpusConfig
from . import screen
from .options import takes_options

if TYPE_CHECKING:
    from ..scan.corpus.build import CorpusProgress, CorpusReport
    from ..scan.corpus.topic import Topic


@takes_options(CorpusConfig, before="text_field")
def corpus(
    source: Annotated[
        str,
        typer.Argument(help="JSONL, JSON, text (also .gz, .zst) or Parquet file, folder, data set on the hub, or -.", show_default=False),
    ],
    topic: Annotated[
        str,
        typer.Option("--topic", "-t", metavar="NAME|FILE", help="python, finance, math, a YAML file, or a new name.", show_default=False),
    ],
    given: Mapping[str, Any],
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
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Tokenizer for --min-tokens and --max-tokens: a folder or a name on the hub.", show_default=False
        ),
    ] = None,
) -> None:
    """Select a corpus on one topic from a large source.

    Writes JSONL, and prints the number of texts kept, and of texts dropped by reason.
    """
    from ..scan.corpus.corpus import build_corpus

    limits = {"min_matches": min_matches, "min_density": min_density}
    about = _topic(
        topic,
        {"keywords": keyword or [], "patterns": pattern or [], "exclude": exclude or []},
        {name: value for name, value in limits.items() if value is not None},
        everything,
    )
    with screen.Progress(f"corpus of {about.name}") as bar:
        report = build_corpus(
            source,
            about,
            output_path,
            tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
            progress=lambda state: show_progress(bar, state),
            **given,
        )
    print(_report_screen(report))


def show_progress(bar: screen.Progress, state: CorpusProgress) -> None:
    bar.update(state.fraction, f"{screen.number(state.read)} read, {screen.number(state.kept)} kept")


def _topic(name: str, added: dict[str, list[str]], limits: dict[str, Any], everything: bool) -> Topic:
    """The named topic, or a new one of that name, with the keywords and patterns of the command line."""
    from ..scan.corpus.topic import Topic, builtin_topics, load_topic

    known = name in builtin_topics() or name.endswith((".yaml", ".yml"))
    matched = added["keywords"] or added["patterns"]
    if everything and (matched or limits):
        raise InputError("--everything cannot be combined with --keyword, --pattern, --min-matches or --min-density.")
    topic = load_topic(name) if known or not (matched or everything) else Topic(name)
    if everything:
        topic = dataclasses.replace(topic, keywords=(), patterns=(), min_matches=1, min_density=0.0)
    longer: dict[str, Any] = {field: (*getattr(topic, field), *values) for field, values in added.items()}
    return dataclasses.replace(topic, **longer, **limits)


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
