"""The head laboratory: attention heads scored before fine-tuning, and what fine-tuning does to them."""
