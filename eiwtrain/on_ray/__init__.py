"""Every touch of Ray: starting or joining it, asking for nodes, the network of the workers, the mailbox."""
