"""Perpetual training: a store of incremental checkpoints, and the log of a life."""
