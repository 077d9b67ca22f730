"""Version 1 of the format."""
