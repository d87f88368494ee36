"""The memory of sparse FFNs: its tables, the ways to compute it, and the choice between them by measurement."""
