"""References of DynNSA and its branches."""
