"""Randomness without state: every draw is a function of what it is for, so any sample can be made at any time."""

from enum import IntEnum
from math import isqrt

import numpy as np

from transect.data.hashing import splitmix64

_ROUNDS = 6


class Purpose(IntEnum):
    """What is drawn; draws for different purposes have nothing to do with each other."""

    ORDER = 0
    PHASE = 1
    MASK = 2
    CUT = 3
    PAIR = 4
    EVALUATION = 5


def draws(seed: int, purpose: Purpose, *numbers: np.ndarray) -> np.ndarray:
    """uint64 in the common shape of the non-negative numbers: others for every seed, purpose and number."""
    state = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    for number in (np.array([purpose]), *numbers):
        state = splitmix64(state ^ number.astype(np.uint64))
    return state


def below(draw: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    """Draws as int64 from 0 to limit - 1; the smaller ones are likelier by at most limit / 2^64."""
    return (draw % np.asarray(limit).astype(np.uint64)).astype(np.int64)


def shuffled(numbers: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where each of `numbers` [n] int64 goes in a shuffle of 0, ..., size - 1; keys [n] uint64 say in which.

    A Feistel network on a square of at least `size` places, walked on from wherever it leaves the range: a permutation
    for every key, in memory that does not grow with `size`.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002), the generalised Feistel construction.
    """
    side = np.uint64(isqrt(size - 1) + 1)
    places = _network(numbers.astype(np.uint64), keys, side)
    outside = places >= size
    while outside.any():
        places[outside] = _network(places[outside], keys[outside], side)
        outside = places >= size
    return places.astype(np.int64)


def _network(places: np.ndarray, keys: np.ndarray, side: np.uint64) -> np.ndarray:
    left, right = np.divmod(places, side)
    for _ in range(_ROUNDS):
        keys = splitmix64(keys)
        left, right = right, (left + splitmix64(right ^ keys) % side) % side
    return left * side + right
