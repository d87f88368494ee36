"""Hugging Face's own families and ours: one file, one family, with its settings and weight names both ways."""
