"""The `tinyonn` command.

Each module parses one command and calls the library, which is imported only then: `tinyonn --help` must not wait for torch.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `tinyonn` command."""
    from .app import run

    sys.exit(run(sys.argv[1:]))
