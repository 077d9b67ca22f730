"""Pages and figures of measurements on attention heads."""
