"""Python face of the .mscan codec."""
