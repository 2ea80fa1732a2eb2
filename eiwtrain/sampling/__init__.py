"""From latents to images, and to files of them. The command is `eiwtrain.sample`."""
