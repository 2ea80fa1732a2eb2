"""What a model gives for images: bits/dim of each, and what is made of them. The command is `eiwtrain.evaluate`."""
