"""The page of a life, and the timeline of lives."""

from .page import write_life_page
from .timeline import LifeLine, write_timeline_page

__all__ = ["LifeLine", "write_life_page", "write_timeline_page"]
