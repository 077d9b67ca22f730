"""The `tinyonn` command.

Each module parses one command and calls the library. It imports the library only inside the command, so that `tinyonn --help` does not
wait for torch.
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Entry point of the `tinyonn` command."""
    from .app import run
    from .processes import end

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a sign gets "?", not a traceback
            stream.reconfigure(errors="replace")
    end(lambda: run(sys.argv[1:]))
