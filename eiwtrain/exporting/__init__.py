"""Exported models: the folder, its card, its forms for MLflow and ONNX, its place in a registry. The command is
`eiwtrain.export`."""
