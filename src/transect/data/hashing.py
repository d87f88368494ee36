"""Hashes of token ids: what splits, samples and fingerprints are drawn from, so that order never matters."""

from hashlib import blake2b

import numpy as np


def token_hashes(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[pieces] uint64 blake2b-8 of the little-endian int64 bytes of ids[start : start + length]."""
    content = memoryview(ids.astype("<i8").tobytes())
    pieces = zip((starts * 8).tolist(), ((starts + lengths) * 8).tolist(), strict=True)
    digests = b"".join(blake2b(content[start:end], digest_size=8).digest() for start, end in pieces)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def keyed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """[pieces] uint64 blake2b-8 of (seed, hash): another order of the same pieces for every seed."""
    key = seed.to_bytes(16, "little", signed=True)
    content = hashes.astype("<u8").tobytes()
    spans = range(0, len(content), 8)
    digests = b"".join(blake2b(content[at : at + 8], digest_size=8, key=key).digest() for at in spans)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """The SplitMix64 generator's output for each uint64 state, any shape."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
