"""References of the statistics."""
