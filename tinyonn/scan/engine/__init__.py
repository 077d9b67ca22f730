"""The scan of one batch: targets, captured norms, proof."""
