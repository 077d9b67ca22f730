"""Extension of the API reference: a field made by `tinyonn._io.options.option` shows its default only."""

from __future__ import annotations

from typing import Any

import griffe


class OptionDefaults(griffe.Extension):
    """Replaces `option(default, ...)`, the value of a field, by `default`; a required field has none."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
            default = value.arguments[0]
            attr.value = None if str(default) == "REQUIRED" else default
