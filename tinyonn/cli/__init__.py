"""The `tinyonn` command."""


def main() -> None:
    """Entry point of the `tinyonn` command."""
