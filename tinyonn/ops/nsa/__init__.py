"""DynNSA and its branches."""
