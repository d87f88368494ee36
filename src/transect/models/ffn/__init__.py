"""Feed-forward networks: one file, one kind."""
