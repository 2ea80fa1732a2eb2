"""Break whole runs at seeded moments and compare them with an undisturbed one; `benchmarks.chaos` is its command."""
