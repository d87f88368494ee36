"""See any model through named tensors that mean the same thing in all of them."""
