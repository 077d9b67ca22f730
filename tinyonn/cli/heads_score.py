"""`tinyonn heads score`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .._io.config import local_model
from .._io.locks import locked
from .._io.records import data_kind
from ..heads.score.config import ScoreConfig
from . import screen
from .options import ConfigFile, configured, print_config_option, takes_options

if TYPE_CHECKING:
    from ..heads.score.score import ScoreResult

_SHOWN = 5  # number of heads printed
_CONFIG_HEADER = "Options of `tinyonn heads score` with their defaults. Pass the file as --config; the command line takes precedence."


@takes_options(ScoreConfig, before="max_samples")
def score(
    given: Mapping[str, Any],
    config: ConfigFile = None,
    print_config: Annotated[bool, print_config_option(ScoreConfig, _CONFIG_HEADER)] = False,
) -> None:
    """Score every attention head over a multiple-choice data set.

    Writes output norm, concentration, attention to the question, and the fusion of their ranks within each layer, as CSV, heat maps and a
    page. Needs one forward pass per prompt; nothing is trained, and attention runs at full speed.
    """
    score_and_draw(configured(ScoreConfig, config, given))


def score_and_draw(options: ScoreConfig) -> None:
    """Scores heads, draws the page with the folder locked, and prints a summary."""
    from ..report.scan.figures import require_matplotlib

    local_model(options.model_path)  # checks paths before it loads the slow libraries
    data_kind(options.data_path)
    require_matplotlib()
    with locked(options.output_dir), screen.Progress("loading") as bar:
        from ..heads import score_heads
        from ..report import write_scores_page

        result = score_heads(options, lambda state: bar.update(state.fraction, state.text, label=state.stage))
        bar.update(None, "", label="drawing")
        page = write_scores_page(result.folder)
    print(result_screen(result, page.html))


def result_screen(result: ScoreResult, page: Path) -> str:
    """Summary of a run: counts, the best heads, and the path of the page."""
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
        lines.append(("no answer", f"in {screen.counted(without, 'row')}, which are scored nevertheless{others}"))
    if summary["truncated"]:
        lines.append(("truncated", f"{screen.counted(summary['truncated'], 'prompt')} at {summary['max_length']} tokens"))
    if summary["spans_lost"]:
        lines.append(("left out", f"{screen.counted(summary['spans_lost'], 'question')} cut by --max-length, of attention to the question"))
    if result.replaced is not None:
        lines.append(("replaces", result.replaced))
    best = top_heads(result.combined, _SHOWN)
    lines.append(("best heads", ", ".join(f"{head.layer}.{head.head}" for head in best) + " (layer.head)"))
    return screen.rows([*lines, ("page", page.resolve())])
