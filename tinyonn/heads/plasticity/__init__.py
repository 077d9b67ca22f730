"""Effects of fine-tuning on attention heads: training, measurement, summary."""
