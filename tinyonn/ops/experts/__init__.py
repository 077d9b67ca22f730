"""Routing, experts and their surprise."""
