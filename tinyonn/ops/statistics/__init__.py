"""Statistics of tokens and of attention."""
