"""Public functions: checks, dispatch, registration."""
