"""What fine-tuning does to attention heads: training, measurement, summary."""
