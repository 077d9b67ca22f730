"""Colours of pages and PNGs. All are readable with the common colour vision deficiencies.

Diverging: blue – neutral – orange/red (the neutral colour is close to the page's background, so light and dark pages differ).
Sequential: the cividis map (Nuñez, Anderton, Renslow, "Optimizing colormaps with consideration for color vision deficiency",
PLOS ONE 2018). Lines: the palette of Okabe and Ito, with dashes as a second sign.
"""

from __future__ import annotations

DIVERGING_LIGHT = ("#2166ac", "#67a9cf", "#d1e5f0", "#f5f5f3", "#fddbc7", "#ef8a62", "#b2182b")
DIVERGING_DARK = ("#8fd0ff", "#3f93d4", "#234f78", "#262a31", "#7a3d22", "#dc7440", "#ffb98a")
# For the background of tokens, most of which are ordinary: from the page's background to a strong colour.
HEAT_LIGHT = ("#f6f7f9", "#fbe3c2", "#f6b773", "#e07f33", "#b04a16", "#762a06")
HEAT_DARK = ("#1c2027", "#47301a", "#814917", "#bf6a1d", "#ee9b4c", "#ffd7a3")
SEQUENTIAL = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")

SERIES_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8558f", "#a87400", "#3a9bd0", "#5b5b5b", "#7a4fb5")
SERIES_DARK = ("#56b4e9", "#ff9248", "#2fc99b", "#e79cc6", "#f0c04a", "#9fd6f5", "#b9bdc4", "#b99cf0")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "", "7 3", "2 3", "9 3 2 3")


def page_palette() -> dict[str, list[str]]:
    """Colour stops for the page's script."""
    return {
        "divergingLight": list(DIVERGING_LIGHT),
        "divergingDark": list(DIVERGING_DARK),
        "sequential": list(SEQUENTIAL),
        "heatLight": list(HEAT_LIGHT),
        "heatDark": list(HEAT_DARK),
    }


def series_css() -> str:
    """Custom properties --s0 … of the line colours, for both colour schemes."""
    light = "".join(f"--s{number}:{colour};" for number, colour in enumerate(SERIES_LIGHT))
    dark = "".join(f"--s{number}:{colour};" for number, colour in enumerate(SERIES_DARK))
    return f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
