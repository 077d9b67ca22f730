"""What all pages share: the page itself, charts, maps, colours."""
