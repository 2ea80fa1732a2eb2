"""Checkpoints: what one is and when it counts, and the writing of one beside training."""
