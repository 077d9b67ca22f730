"""References of routing, experts and surprise."""
