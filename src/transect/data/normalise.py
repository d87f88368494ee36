"""Text made the same however it was typed: what the corpus keeps of a document's characters."""

import re
import unicodedata

_LINE = re.compile("\r\n|[\r\x0b\x0c\x85]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_HALF = re.compile("[\ud800-\udfff]")
_PLAIN = bytes(byte for byte in range(128) if byte not in (9, 10) and (byte < 32 or byte == 127))
_MARK = "\ufeff"


def normalise(text: str) -> str:
    r"""The text in Unicode's form NFC, with \n at the end of every line, without control characters or order mark.

    In this order: control characters other than tab and line ends go; \r\n, \r, vertical tab, form feed and NEL become
    \n; then NFC, and byte order marks at the start go. Doing it twice changes nothing. Blanks stay as they are.
    """
    if text.isascii() and len(content := text.encode()) == len(content.translate(None, _PLAIN)):
        return text  # nothing to change, as is the rule
    text = _LINE.sub("\n", _CONTROL.sub("", text))
    return unicodedata.normalize("NFC", text).lstrip(_MARK)


def writable(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON can hold and UTF-8 cannot, replaced by U+FFFD."""
    return text if text.isascii() else _HALF.sub("\ufffd", text)
