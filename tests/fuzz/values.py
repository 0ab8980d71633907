"""What hostile rows are made of: texts, values of any type, lines, URIs."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

GOOD_AUDIO = "../audio/good.wav"
CSV_HEADER = b"\xef\xbb\xbfid,mixture,positive_text,start,duration,snr_db,note\r\n"
# fmt: off
TEXTS = (
    "\0", "a\0b", "\x1b[2J\x1b]0;owned\x07", "\r\n\r\n", "\u202egnp.wav", "\u200b", "\ufeff", "🐦" * 50,
    "\ufdfa",
    "../../escape", "/etc/passwd", "..", ".", "/", "\\\\server\\share", "C:\\x", "con", "NUL.txt", "aux.",
    "-rf",
    "%2e%2e%2f", "$(touch /tmp/owned)", "`id`", "{0}", "%s%n", "a" * 10_240, "é" * 5000, "\ud800",
    "*?[a]", "~",
    "e\u0301", "\u00e9", "\u212b", "\u00c5", "\u017f", "ß", "SS", "=1+1", "'; drop", "\x7f", "\x85",
    "\u2028", " x ",
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 7, 1.5, -0.0, 5e-324, 1e308, -1e308, float("nan"), float("inf"), 10**400,
    2**63,
    "", " ", "NaN", "1e400", "0x10", "1_0", "\u0663", "soon", [], [None], [""], [[]], [1], {},
    {"a": {"b": []}},
    ["dog"] * 300, ["dog", 3], "x" * 100_000, ["\0"], {"": 1},
)
TIMES = (-0.0, 0.0, 5e-324, 1e-300, 1e-6, 1e308, 1.79e308, 1e15, 2**62, -1e-9, "0", "1e-3", 0.1)
LEVELS = (1e308, -1e308, 6166.0, -6166.0, 700, -700, 100, -100, 5e-324, "-0", "1e3")
LINES = (
    b"{", b"null", b"[]", b"3", b'"text"', b"\xff\xfe\x00", b'{"id": "\xc3\x28"}', b"{}",
    b'{"id": 1, "id": 2}',
    b"[" * 5000, b'{"a":' * 5000, b'{"id": ' + b"9" * 5000 + b"}", b'{"start": NaN}', b"PK\x03\x04",
    b"\xef\xbb\xbf{}",
    b'{"note": ' + b"[" * 65 + b"]" * 65 + b"}", b'{"": ""}', b"{'id': 1}", b'{"id": "\\ud800"}',
    b'{"\\udfff": 1}',
    b"id,mixture", b"\0", b"{}{}", b'{"id": "a",}', b"-", b"// comment", b"{" + b'"a": 1, ' * 3000 + b"}",
)
# One record each, however many fields it has.
CSV_LINES = (
    b",,,,,,", b",", b'""', b" ", b"a,b,c,d,e,f,g,h,i", b'"a"b,c', b'a"b,../audio/good.wav,dog,,,,',
    b"\0,\0,\0,,,,",
    b"\xff,\xfe,\xfd,,,,", b'x,y,dog,,,,"two\r\nlines"', b"\xef\xbb\xbf,,,,,,", b"a;b;c;d;e;f;g",
    b"a\tb\tc",
    b'"' + b"q" * 10_240 + b'",m,dog,,,,', b"\x1b[31m,x,dog,,,,", b"x,y,dog,nan,inf,-inf,",
    b"''',x,dog,,,,",
    b"x,,,,,,\x85\x1c", b"x,../audio/good.wav,dog,-1,0,1e999,", b"," * 5000,
)
URIS = (
    "nosuch://a/b.wav", "file://", "file:///dev/zero", "memory://absent.wav", "::", "zip://x.wav::{good}",
    "://",
    "simplecache::{good}", "filecache::{good}", "zip://{good}", "dir://a::{good}", "file://host/{good}",
    "{good}\0.png",
    "{good}/", "{good}/x.wav", "{good}?x=1", "{good}#x", "{good}*", "[", "a" * 300 + ".wav",
    "a/" * 5000 + "x.wav",
    "data:audio/wav;base64,UklGRg==", "tar://x::{good}", "reference://{good}", "local://{good}",
    "~/x.wav", "~nobody/x",
    "/dev/zero", "/dev/null", "/dev/full", "/dev/urandom", "/proc/self/mem", "/proc/kmsg",
    "/proc/self/fd/0", "/dev/tty",
    "/sys/kernel/notes", "/proc/self/environ", "/", "", ".", "..", " ", "\n", "git://x", "libarchive://x",
    "hdfs://x/y",
)
PLACES = (
    "folder", "pipe", "socket", "loop", "dangling", "locked.wav", "text.wav", "empty.wav", "link.wav",
    "a\nb.wav",
)
# fmt: on


def arrow_arrays() -> Iterator[pa.Array]:
    """Arrays of one value, of every type that Parquet holds and a manifest hardly should."""
    for value in (1, 1.5, True, b"\xff\0", "dog", ["dog"], [["dog"]], {"a": {"b": "c"}}, None):
        yield pa.array([value])
    yield pa.array([decimal.Decimal("0.1")])
    yield pa.array([datetime.timedelta(days=1)])
    yield pa.array([2**64 - 1], pa.uint64())
    yield pa.array([2**31 - 1], pa.int32()).cast(pa.date32())
    for unit in ("ms", "us", "ns"):
        yield pa.array([2**62], pa.int64()).cast(pa.timestamp(unit))
        yield pa.array([2**62], pa.int64()).cast(pa.timestamp(unit, "Nowhere/Land"))
    yield pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))
    yield pa.array(["dog"]).dictionary_encode()
    yield pa.array(["dog"], pa.large_string())
    yield pa.array(["dog"], pa.string_view())
    yield pa.array([["dog", None]], pa.list_(pa.string(), 2))
    yield pa.array([float("nan")], pa.float16())
    yield pa.array([b"0123456789abcdef"], pa.uuid())
