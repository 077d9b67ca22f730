"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


# The choices of ScanConfig, in the form that Typer reads; a test holds the two together.
class Credit(StrEnum):
    full = "full"
    local = "local"


class Dtype(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Store(StrEnum):
    records = "records"
    integral = "integral"


class Codec(StrEnum):
    log2u16 = "log2u16"
    f32 = "f32"


class Compression(StrEnum):
    zstd = "zstd"


class Sync(StrEnum):
    none = "none"
    chunk = "chunk"
    close = "close"


Output = Annotated[Path, typer.Option("--output-path", "-o", metavar="PATH", help="The new file.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Figures = Annotated[bool, typer.Option("--figures/--no-figures", help="Draw PNGs beside the page.")]
CodecChoice = Annotated[
    Codec | None, typer.Option(help="log2u16: 2 bytes a value. f32: 4 bytes, exact. [default: see above]", show_default=False)
]
CompressionChoice = Annotated[Compression | None, typer.Option(help="Compress the values. [default: no]", show_default=False)]


def coding(codec: Codec | None, compression: Compression | None) -> dict[str, str]:
    """What was chosen of the two, as options of a writer."""
    chosen = {"codec": codec, "compression": compression}
    return {name: value.value for name, value in chosen.items() if value is not None}
