"""The page of a life."""

from .page import write_life_page

__all__ = ["write_life_page"]
