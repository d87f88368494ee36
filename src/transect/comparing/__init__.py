"""What `compare` is made of: runs and their curves, arms, alignments, statistics over seeds, words."""
