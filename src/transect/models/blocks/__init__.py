"""Layer architectures: one file, one block."""
