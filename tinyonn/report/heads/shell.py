"""Parts shared by all pages of heads: the frame, and short names of models and data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from ..._io.units import counted
from ..html.maps import HeatMap
from ..html.page import maps_data, page
from ..scan.heads import head_names
from .files import HeadColumns

# Names of checkpoint folders, which do not identify the model.
_CHECKPOINT = re.compile(r"(ckpt|checkpoint|epoch|step|iter)([-_.]?\w+)*|best|final|last|latest|model|output", re.IGNORECASE)


def head_page(title: str, front: Sequence[str], body: Iterable[str], heads: HeadColumns, maps: Iterable[HeatMap]) -> str:
    """A whole page with maps of heads.

    Args:
        title: heading.
        front: parts of the subtitle before the numbers of layers and heads.
        body: HTML of the sections, with the cards of the maps.
        heads: the heads of the model.
        maps: the maps.
    """
    subtitle = ", ".join([*front, counted(len(heads.layers), "layer"), counted(len(heads.places), "head")])
    return page(title, f"{subtitle}.", body, {"maps-data": maps_data(maps, heads.layers, *head_names(heads.num_heads))})


def model_title(model: object, path: object) -> str:
    """A model's name for a title. The name of a checkpoint folder is preceded by its two parent folders.

    Args:
        model: name in the run's files.
        path: path of the model.
    """
    name = Path(str(model or "a model")).name or str(model)
    around = PurePath(str(path or "")).parts
    return "/".join(part for part in around[-3:] if part not in ("/", "..")) if _CHECKPOINT.fullmatch(name) and around else name


def short_data(data: object) -> str:
    """A data file with its parent folder, which often has the data set's name."""
    return "/".join(PurePath(str(data or "data")).parts[-2:])
