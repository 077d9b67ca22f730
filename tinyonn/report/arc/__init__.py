"""The page of an evaluation on ARC."""

from .page import write_arc_page

__all__ = ["write_arc_page"]
