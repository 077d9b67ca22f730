"""Dense, readable oracles of each op; float64-safe; never imports a kernel."""
