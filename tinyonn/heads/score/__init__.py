"""Scores of attention heads before fine-tuning."""
