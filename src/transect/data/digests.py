"""Digests of files, read in pieces."""

import hashlib
from pathlib import Path

_PIECE = 1 << 22  # bytes


class Digest:
    """BLAKE2b, 16 bytes, of whatever it is fed."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def feed(self, file: Path, also: "Digest | None" = None) -> "Digest":
        """Add the content of a file, here and to another digest."""
        with file.open("rb") as handle:
            while piece := handle.read(_PIECE):
                self._state.update(piece)
                if also is not None:
                    also._state.update(piece)
        return self

    @property
    def text(self) -> str:
        """32 hexadecimal digits."""
        return self._state.hexdigest()


def file_digest(file: Path) -> str:
    """32 hexadecimal digits of a file's content."""
    return Digest().feed(file).text
