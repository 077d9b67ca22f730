"""`tinyonn heads score`."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._io.config import local_model
from .._io.locks import locked
from .._io.records import data_kind
from ..heads.score.config import ScoreConfig
from . import screen
from .options import DTYPE, config_option, field_defaults, given_options, print_config_option

if TYPE_CHECKING:
    from ..heads.progress import Progress
    from ..heads.score.score import ScoreResult

_DEFAULTS = field_defaults(ScoreConfig)
_option = partial(config_option, _DEFAULTS)
_SHOWN = 5  # heads printed


# The choices of ScoreConfig, in the form that Typer reads; a test holds the two together.
class QueryMode(StrEnum):
    last_token = "last_token"
    all_tokens = "all_tokens"


class NormMode(StrEnum):
    zscore = "zscore"
    percentile = "percentile"


def score(
    model_path: Annotated[str | None, _option("model_path", "Folder of a transformer, or its name on the hub.", "PATH", "-m")] = None,
    data_path: Annotated[
        str | None, _option("data_path", "Multiple-choice questions: JSONL, a JSON list or Parquet.", "PATH", "-d")
    ] = None,
    output_dir: Annotated[str | None, _option("output_dir", "Folder of the results.", "DIR", "-o", "--output")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file of these options; options given here win.")] = None,
    print_config: Annotated[bool, print_config_option("tinyonn.heads", "score_default.yaml")] = False,
    max_samples: Annotated[int | None, _option("max_samples", "Rows drawn, no more than there are. [default: 1024, or all]", "N")] = None,
    batch_size: Annotated[int | None, _option("batch_size", "Prompts in one forward pass.", "N")] = None,
    max_length: Annotated[int | None, _option("max_length", "Tokens of a prompt.", "N")] = None,
    device: Annotated[str | None, _option("device", "auto, cpu, cuda or cuda:N.", "NAME")] = None,
    dtype: Annotated[str | None, _option("dtype", "Precision of the model; auto: fp16 on a GPU, fp32 on a CPU.", DTYPE)] = None,
    seed: Annotated[int | None, _option("seed", "Of the draw of rows.", "N")] = None,
    skip_unlabelled: Annotated[bool | None, _option("skip_unlabelled", "Leave out rows without an answer (-1, null, missing).")] = None,
    score_query_mode: Annotated[
        QueryMode | None,
        _option("score_query_mode", "What each prompt's last token does, or the mean over its tokens.", "last_token|all_tokens"),
    ] = None,
    norm_mode: Annotated[NormMode | None, _option("norm_mode", "Of scores_norm.csv, within each layer.")] = None,
    lambda_ent: Annotated[float | None, _option("lambda_ent", "Weight of the rank of concentration.", "X")] = None,
    lambda_task: Annotated[float | None, _option("lambda_task", "Weight of the rank of attention to the question.", "X")] = None,
    top_k: Annotated[int | None, _option("top_k", "Heads listed, of the model and of each layer.", "N")] = None,
    prompt_template: Annotated[
        str | None, _option("prompt_template", "Text with {question}, {choices} and {context}. [default: built in]", "FILE")
    ] = None,
    field_map: Annotated[
        str | None, _option("field_map", "Layout of the rows: a name or a YAML file. [default: found]", "NAME|FILE")
    ] = None,
    out_projection: Annotated[
        bool | None, _option("out_projection", "Output norms after each head's slice of the output projection.")
    ] = None,
) -> None:
    """Score every attention head over a multiple-choice data set.

    Output norm, concentration, attention to the question, and the fusion of their ranks within each layer, as CSV, heat maps and a page.
    One forward pass a prompt; nothing is trained, and attention runs as fast as it always does.
    """
    explicit = given_options(locals(), _DEFAULTS)
    score_and_draw(ScoreConfig.from_yaml(config, **explicit) if config else ScoreConfig.from_mapping(explicit, source="a --config file"))


def score_and_draw(options: ScoreConfig) -> None:
    """Scores, draws their page while no other run may write scores into the folder, and prints what was done."""
    from ..report.scan.figures import require_matplotlib

    local_model(options.model_path)  # what is mistyped, before the libraries that take seconds to load
    data_kind(options.data_path)
    require_matplotlib()
    with locked(options.output_dir), screen.Progress("loading") as bar:
        from ..heads import score_heads
        from ..report import write_scores_page

        result = score_heads(options, progress=partial(show_progress, bar))
        bar.update(None, "", label="drawing")
        page = write_scores_page(result.folder)
    print(result_screen(result, page.html))


def show_progress(bar: screen.Progress, state: Progress) -> None:
    bar.update(state.fraction, state.text, label=state.stage)


def result_screen(result: ScoreResult, page: Path) -> str:
    """What was done, the best heads, and where the page lies."""
    from ..heads.score.fusion import top_heads

    summary = result.summary
    lines: list[tuple[str, object]] = [
        ("scored", f"{summary['heads']:,} heads in {summary['layers']} layers of {summary['model']}"),
        ("over", f"{screen.counted(summary['samples'], 'sample')}, {screen.counted(summary['tokens'], 'token')}"),
        ("took", screen.duration(summary["seconds"])),
    ]
    if summary["unlabelled"]:
        lines.append(("left out", f"{screen.counted(summary['unlabelled'], 'row')} without an answer"))
    elif without := summary["samples"] - summary["answered"]:
        others = "; --skip-unlabelled leaves these out" if summary["answered"] else ""
        lines.append(("no answer", f"in {screen.counted(without, 'row')}, scored all the same{others}"))
    if summary["truncated"]:
        lines.append(("truncated", f"{screen.counted(summary['truncated'], 'prompt')} at {summary['max_length']} tokens"))
    if summary["spans_lost"]:
        lines.append(("left out", f"{screen.counted(summary['spans_lost'], 'question')} cut by --max-length, of attention to the question"))
    if result.replaced is not None:
        lines.append(("replaces", result.replaced))
    best = top_heads(result.combined, _SHOWN)
    lines.append(("best heads", ", ".join(f"{head.layer}.{head.head}" for head in best) + " (layer.head)"))
    return screen.rows([*lines, ("page", page.resolve())])
