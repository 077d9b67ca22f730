"""Parts that all pages share: the frame, charts, maps, colours."""
