"""Scores of images under a model, bits/dim of each, and figures computed from them; the command is
`eiwtrain.evaluate`."""
