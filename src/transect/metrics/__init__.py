"""Pure functions from tensors to tensors, each with its declared range, unit and invariances."""
