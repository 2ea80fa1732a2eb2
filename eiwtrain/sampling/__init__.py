"""Images decoded from latents, and files of them. The command is `eiwtrain.sample`."""

BATCH = 64
"""Images at a time, unless a command is given another number."""
