"""Corpora: reading records, cutting topics from large sources."""
