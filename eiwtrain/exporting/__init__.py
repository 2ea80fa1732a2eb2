"""What goes with an exported model: its card, its forms for others, its place in a registry. The command is
`eiwtrain.export`."""
