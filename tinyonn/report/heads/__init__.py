"""Pages and figures of the head laboratory."""
