"""Rules that pick memory blocks for a token: one file, one selector."""
