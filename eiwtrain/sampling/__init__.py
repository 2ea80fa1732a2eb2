"""Images decoded from latents, and files of them. The command is `eiwtrain.sample`."""
