"""Hooks into Hugging Face transformers."""
