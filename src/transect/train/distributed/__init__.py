"""One process or many: which part of each batch and of each table a process has."""
