"""`tinyonn doctor`."""

from __future__ import annotations

import typer

from . import checks


def doctor() -> None:
    """Check this machine: Python, compiler, torch, packages, data.

    One line per check, with a remedy for what is missing. The exit code is 1 if something essential is missing.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    colours = {checks.OK: "green", checks.MISSING: "yellow", checks.FAILED: "bold red"}
    failed = []
    for finding in checks.run_checks():
        line = Text.assemble((f"{finding.state:<4}", colours[finding.state]), f"  {finding.name:<12}  {finding.found}")
        if finding.remedy:
            line.append(f" → {finding.remedy}", style="cyan")
        console.print(line)
        failed += [finding.name] if finding.state == checks.FAILED else []
    if failed:
        console.print(f"Not usable: {', '.join(failed)}.")
        raise typer.Exit(1)
    console.print("Usable.")
