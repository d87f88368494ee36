"""Pre-training: a recipe and a prepared corpus in; rows, checkpoints and a model out."""
