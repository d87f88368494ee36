"""Numbers drawn once, the same in every run and on every device."""

import hashlib

import torch


def generator(seed: int | str, layer: int | None) -> torch.Generator:
    """A CPU generator of its own for each seed and layer; None: one for all layers."""
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
