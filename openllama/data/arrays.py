"""The elements of a JSON array, however long the file. One that is broken costs itself, or its neighbour too, not the rest.

An element that is right, and no longer than may be, is never divided. Mostly the JSON parser reads it at once; where it is
long, or not right, it is followed token by token. A missing quote or bracket shows soon, as two tokens that can't follow
each other; or else, at the end of the file or of what memory may hold, as an element that has swallowed its siblings (their
first key is its own). Reading then goes on at the next border `}, {"` behind the element's beginning: within a string, that
quote were escaped. Objects nested in a broken element may so be taken for elements.
"""

from __future__ import annotations

import json
import re
from codecs import utf_8_decode
from collections.abc import Iterator
from typing import Any

from .lines import LONGEST, Unreadable

# Bytes read on at a time, and seen by a regular expression at once: its stack takes some dozen times as much.
READ = 1 << 18
# Bytes that the parser tries at once; few behind what was broken: what follows may be so too.
WINDOW_LEAST, WINDOW_MOST = 1 << 12, 1 << 20
DEEPEST = 100_000  # brackets open at once; the JSON parser takes far fewer
BORDER = rb"[}\]]\s{0,64}[,\[]?\s{0,64}(?=\{\s{0,64}%s)"  # a missing comma, or a second array, makes one too
BORDER_BYTES = 512  # more than it ever matches
WRONG = b"wrong"

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")
_COMMA = re.compile(r"\s*,")
_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_TOKEN = re.compile(rb'\s*(?:[^\s"{}\[\],:]+|(["{}\[\],:]))')
_FIRST_KEY = re.compile(rb'[\s\[{,]*("[^"\\]{1,256}")')
_ANY_BORDER = re.compile(BORDER % b'"')

Element = bytes | dict[str, Any] | Unreadable  # its text, or what the parser made of an object


def elements(text: bytes, pieces: Iterator[bytes], longest: int = LONGEST) -> Iterator[tuple[int, Element]]:
    """Of what follows an array's `[` (`text`, then `pieces`), each element with its number from 1.

    One of more than `longest` bytes is passed over. (0, "empty file") where the array holds none.
    """
    array, number = _Array(text, pieces, longest), 0
    for number, data in enumerate(array, 1):
        yield number, data
    if not number:
        yield 0, Unreadable("empty file")


class _Array:
    def __init__(self, text: bytes, pieces: Iterator[bytes], longest: int) -> None:
        self._text, self._at = text, 0  # what lies in memory, and where in it the next element begins
        self._pieces, self._longest = pieces, longest
        self._read, self._read_again = len(text), 0  # bytes
        self._window = self._most = min(WINDOW_MOST, longest)
        self._ended = False
        self._damage: Unreadable | None = None  # of the file, named last

    def __iter__(self) -> Iterator[Element]:
        first = True
        while not self._ended:
            for parsed in self._parsed():
                first = False
                yield parsed
            for followed in self._next(first):
                first = False
                fits = 2 * len(followed) if isinstance(followed, bytes) else 0
                self._window = min(max(fits, WINDOW_LEAST), self._most)
                yield followed
        if self._damage:
            yield self._damage

    def _parsed(self) -> Iterator[Element]:
        """Elements up to the first that is not right, or not whole in a window."""
        end = 1
        while end:
            if len(self._text) - self._at < self._window:
                self._text, self._at = self._text[self._at :] + self._more(self._window), 0
            text, end = _decoded(self._text[self._at : self._at + self._window]), 0
            while whole := _parse(text, end):
                value, begin, behind, end = whole
                yield value if isinstance(value, dict) else text[begin:behind].encode()
            self._at += len(text[:end].encode())
            self._window = min(2 * self._window, self._most)

    def _next(self, first: bool) -> Iterator[bytes | Unreadable]:
        """The next element token by token, and what is wrong behind it."""
        at, mark, too_long = self._follow()
        siblings = None if mark or too_long else self._siblings()
        if mark == WRONG or siblings:
            yield Unreadable(
                "not JSON", "a quote or bracket is missing or one too many; read on at the next `}, {`"
            )
            self._go_on(siblings or _ANY_BORDER, at)
        elif not mark:
            self._ended = True
            self._damage = self._damage or Unreadable("truncated JSON array", "no ] at the file's end")
        else:
            element = self._text[self._at : at].strip()
            if too_long or len(element) > self._longest:
                yield Unreadable("record too long", f"takes at most {self._longest:,} bytes")
            elif element or mark == b"," or not first:  # else it is [], which holds none
                yield element or Unreadable("not JSON", "nothing between two commas")
            self._at = at + 1
            if mark == b"]" and not self._blank_to_the_end():
                yield Unreadable("more than one JSON value", "text after the array's end")
                self._go_on(_ANY_BORDER, self._at)

    def _follow(self) -> tuple[int, bytes, bool]:
        """Where the next element stops, by what (b"": the file ends, or siblings were swallowed), whether it is too long."""
        lexer, at, too_long = _Lexer(), self._at, False
        while True:
            at, mark = lexer.follow(self._text, at)
            if mark:
                return at, mark, too_long
            if too_long or at - self._at > self._longest:
                if not too_long and self._siblings():
                    return at, b"", False
                self._at, too_long = at, True  # its text is let go
            self._text, self._at, at = self._text[self._at :], 0, at - self._at
            if not (more := self._more(max(READ, len(self._text)))):
                # behind a whole element, only the comma or bracket is missing
                return at, b"," if lexer.whole else b"", too_long
            self._text += more

    def _siblings(self) -> re.Pattern[bytes] | None:
        """The border before those that the element has swallowed, if it has."""
        key = _FIRST_KEY.match(self._text, self._at)
        if key is None:
            return None
        border = re.compile(BORDER % re.escape(key[1]))
        return border if border.search(self._text, self._at + 1) else None

    def _go_on(self, border: re.Pattern[bytes], at: int) -> None:
        """Makes the next element begin at the border behind the beginning of this one, which was followed up to `at`.

        In files made to be slow, behind `at`: in all, no more is read twice than once.
        """
        self._read_again += at - self._at
        begin = self._at + 1 if self._read_again <= self._read + self._longest else at
        while not (found := border.search(self._text, begin)):
            self._text, begin = self._text[max(begin, len(self._text) - BORDER_BYTES) :], 0
            if not (more := self._more(READ)):
                self._ended = True
                return
            self._text += more
        self._at = found.end()

    def _blank_to_the_end(self) -> bool:
        rest = self._text[self._at :]
        while not rest.strip():
            if not (rest := self._more(READ)):
                self._ended = True
                return True
        self._text, self._at = b" ]" + rest, 0  # a border may begin with it
        return False

    def _more(self, size: int) -> bytes:
        """So many bytes more, or those up to the end of the file or to a damaged place."""
        got, total = [], 0
        try:
            while total < size and (piece := next(self._pieces, None)) is not None:
                got.append(piece)
                total += len(piece)
        except Unreadable as why:
            self._damage = why
        self._read += total
        return b"".join(got)


def _decoded(window: bytes) -> str:
    """Up to the first byte that is no UTF-8."""
    try:
        return utf_8_decode(window, "strict", False)[0]  # may end within a character
    except UnicodeDecodeError as e:
        return window[: e.start].decode()


def _parse(text: str, at: int) -> tuple[Any, int, int, int] | None:
    """The value that begins at `at`, where, where it ends, and where the comma behind it does."""
    begin = space.end() if (space := _SPACE.match(text, at)) else at
    try:
        value, behind = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    comma = _COMMA.match(text, behind)
    return (value, begin, behind, comma.end()) if comma else None


class _Lexer:
    """Follows one element from piece to piece. It keeps the brackets that are open, none of the text."""

    def __init__(self) -> None:
        self._open = bytearray()
        self._last = b","  # the token before by its first character; b"0" for a number or another bare word
        self._in_string = False

    @property
    def whole(self) -> bool:
        """Whether an object is complete. A list that ends with the file may have taken the `]` of the array."""
        return not self._open and self._last == b"}"

    def follow(self, text: bytes, at: int) -> tuple[int, bytes]:
        """Goes on from `at`. Returns where it stops, and why: at the `,` or `]` behind the element; at what can't follow,
        WRONG; or, b"", because it needs more text, from there on."""
        while at < len(text):
            if self._in_string:
                end = self._string_end(text, at)
                if end == at:
                    break  # at half an escape
                at = end
                continue
            token = _TOKEN.match(text, at)
            if token is None:
                return len(text), b""
            mark = token[1] or b"0"
            if mark in b",]" and not self._open:
                return token.start(1), mark
            if not self._may_follow(mark):
                return at, WRONG
            self._last, at = mark, token.end()
            if mark == b'"':
                self._in_string = True
            elif mark in b"{[":
                self._open += mark
            elif mark in b"}]":
                self._open.pop()
        return at, b""

    def _string_end(self, text: bytes, at: int) -> int:
        rest = _REST_OF_STRING.match(text, at, at + READ)
        end = rest.end() if rest else at
        if text[end : end + 1] == b'"':
            self._in_string = False
            return end + 1
        return end

    def _may_follow(self, mark: bytes) -> bool:
        outer = self._open[-1:]
        if mark in b"}]":
            return outer == (b"{" if mark == b"}" else b"[")
        if mark in b",:":
            return True
        if mark in b"{[" and len(self._open) == DEEPEST:
            return False
        before = {b"": b",", b"[": b"[,", b"{": b"{,:" if mark == b'"' else b":"}[bytes(outer)]
        # a word may lie in two pieces
        return self._last in before or self._last == mark == b"0"
