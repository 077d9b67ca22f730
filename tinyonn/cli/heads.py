"""`tinyonn heads`: the commands of the head laboratory."""

from __future__ import annotations

import typer

from .demo.heads import demo
from .heads_plasticity import plasticity
from .heads_score import score

heads = typer.Typer(help="Score a model's attention heads, and measure what fine-tuning does to them.")
heads.command("score")(score)
heads.add_typer(plasticity, name="plasticity")
heads.command("demo")(demo)
