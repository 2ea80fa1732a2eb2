"""Hooks with which tests break a real run and count what it did; off unless an environment variable names them."""
