"""Runnable benchmarks; each prints a table and can write JSON."""
