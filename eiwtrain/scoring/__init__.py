"""Scores of images under a model, bits/dim of each, and figures computed from them; the command is
`eiwtrain.evaluate`."""

FID_SAMPLES = 10_000
"""Samples for FID where their number is not given and there are as many images."""
