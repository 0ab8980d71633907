"""Audio files that are damaged, lie about themselves or are merely odd, made from real recordings."""

from __future__ import annotations

import io
import struct
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import soundfile

RECORDINGS = Path(__file__).parents[2] / "manifests" / "audio"
FRAMES = 2000
# (format, encoding, extension)
ENCODINGS = (
    *(("WAV", encoding, "wav") for encoding in ("PCM_16", "PCM_U8", "FLOAT", "DOUBLE", "ULAW")),
    *(("WAV", encoding, "wav") for encoding in ("MS_ADPCM", "IMA_ADPCM", "GSM610")),
    ("WAVEX", "PCM_24", "wav"),
    *(("FLAC", encoding, "flac") for encoding in ("PCM_16", "PCM_24", "PCM_S8")),
    *(("OGG", "VORBIS", "ogg"), ("OGG", "OPUS", "opus"), ("MP3", "MPEG_LAYER_III", "mp3")),
    *(("AIFF", encoding, "aiff") for encoding in ("PCM_16", "FLOAT", "IMA_ADPCM", "PCM_24")),
    *(("AU", encoding, "au") for encoding in ("PCM_16", "G723_24")),
    *(("W64", encoding, "w64") for encoding in ("PCM_16", "MS_ADPCM")),
    *(("CAF", encoding, "caf") for encoding in ("PCM_16", "ALAC_16", "FLOAT")),
    *(("RF64", "PCM_16", "rf64"), ("VOC", "PCM_16", "voc"), ("NIST", "PCM_16", "sph")),
    *(
        ("IRCAM", "PCM_16", "sf"),
        ("PAF", "PCM_24", "paf"),
        ("SVX", "PCM_16", "iff"),
        ("MAT4", "PCM_16", "mat"),
    ),
    *(("SDS", "PCM_16", "sds"), ("XI", "DPCM_16", "xi"), ("HTK", "PCM_16", "htk"), ("PVF", "PCM_16", "pvf")),
)
# Where headers say how much follows, how fast and how wide: (tag, offset from it, bytes, byte order).
_RIFF = (
    *((b"fmt ", 8, 2, "little"), (b"fmt ", 10, 2, "little"), (b"fmt ", 12, 4, "little")),
    *((b"fmt ", 20, 2, "little"), (b"fmt ", 22, 2, "little")),
)
_FIELDS = {
    "WAV": (*_RIFF, (b"RIFF", 4, 4, "little"), (b"data", 4, 4, "little"), (b"fmt ", 4, 4, "little")),
    "WAVEX": (*_RIFF, (b"RIFF", 4, 4, "little"), (b"data", 4, 4, "little")),
    "RF64": (*_RIFF, *((b"ds64", offset, 8, "little") for offset in (8, 16, 24)), (b"ds64", 4, 4, "little")),
    "W64": ((b"data", 16, 8, "little"), (b"riff", 16, 8, "little"), (b"fmt ", 28, 4, "little")),
    "AIFF": (
        (b"COMM", 8, 2, "big"),
        (b"COMM", 10, 4, "big"),
        (b"COMM", 16, 8, "big"),
        (b"SSND", 4, 4, "big"),
    ),
    "AU": tuple((b".snd", offset, 4, "big") for offset in (4, 8, 12, 16, 20)),
    "CAF": (
        (b"data", 4, 8, "big"),
        (b"desc", 12, 8, "big"),
        *((b"desc", at, 4, "big") for at in (28, 32, 36, 40)),
    ),
    "FLAC": (
        (b"fLaC", 18, 8, "big"),
        (b"fLaC", 21, 5, "big"),
        (b"fLaC", 8, 4, "big"),
        (b"fLaC", 4, 4, "big"),
    ),
    "OGG": (
        *((b"OggS", 6, 8, "little"), (b"OggS", 14, 4, "little"), (b"OggS", 18, 4, "little")),
        *((b"OpusHead", 9, 1, "little"), (b"OpusHead", 10, 2, "little"), (b"OpusHead", 12, 4, "little")),
        *(
            (b"\x01vorbis", 11, 1, "little"),
            (b"\x01vorbis", 12, 4, "little"),
            (b"\x01vorbis", 28, 1, "little"),
        ),
    ),
    "MP3": ((b"Info", 8, 4, "big"), (b"Xing", 8, 4, "big"), (b"Info", 12, 4, "big"), (b"ID3", 6, 4, "big")),
    "VOC": ((b"Creative", 20, 2, "little"), (b"Creative", 27, 3, "little"), (b"Creative", 30, 4, "little")),
    "NIST": ((b"-i ", 3, 4, "big"),),
}
_CLAIMS = (0, 1, 2, 3, 64, 255, 1024, 44100, 10**6, 768_000, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 10**15)
_RATES = (1, 2, 7, 99, 999, 4000, 7919, 96_000, 655_350, 655_351, 768_000, 1_000_000, 1_000_001, 2**31 - 1)
_CHANNELS = (1, 2, 3, 6, 8, 9, 12, 64, 65, 255, 1024)


@cache
def recording(number: int, channels: int) -> np.ndarray:
    """A piece of one of the recordings, float32 (n, channels)."""
    paths = sorted(RECORDINGS.glob("*.flac"))
    samples, _ = soundfile.read(paths[number % len(paths)], FRAMES, 8000, dtype="float32", always_2d=True)
    return np.repeat(samples[:, :1], channels, axis=1)


def encode(samples: np.ndarray, rate: int, container: str, encoding: str) -> bytes:
    """A file of these samples (n, channels)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, encoding, format=container)
    content = bytearray(buffer.getvalue())
    # The time and random numbers that libsndfile puts in.
    if (at := content.find(b"PEAK")) >= 0:
        content[at + 12 : at + 16] = bytes(4)
    if container == "OGG":
        return _with_checksums(bytes(content), serial=1)
    return bytes(content)


@cache
def plain(container: str, encoding: str, variant: int) -> bytes:
    """A good file; `variant` chooses the recording, its channels and its rate."""
    for channels, rate in (((1, 16000), (2, 48000), (1, 8000))[variant % 3], (1, 16000), (1, 8000)):
        try:
            return encode(recording(variant, channels), rate, container, encoding)
        except soundfile.LibsndfileError:
            continue
    raise ValueError(f"{container} {encoding} cannot be written")


def any_plain(random: Random) -> tuple[str, str, bytes]:
    """(container, extension, contents) of a good file."""
    container, encoding, extension = random.choice(ENCODINGS)
    return container, extension, plain(container, encoding, random.randrange(6))


def damaged(random: Random) -> tuple[str, bytes]:
    """(extension, contents) of a file with bytes changed, lost or added, mostly in its header."""
    _, extension, content = any_plain(random)
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        if not content:
            break
        region = random.choice((64, 256, len(content)))
        at = random.randrange(min(region, len(content)))
        count = random.randrange(1, 64)
        match random.choice(
            ("flip", "set", "cut", "claim", "long", "repeat", "lose", "zero", "noise", "join")
        ):
            case "flip":
                content[at] ^= 1 << random.randrange(8)
            case "set":
                content[at] = random.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))
            case "cut":
                del content[at:]
            case "claim":
                value = random.choice((*_CLAIMS, random.getrandbits(32))) % 2**32
                content[at : at + 4] = value.to_bytes(4, random.choice(("little", "big")))
            case "long":
                value = random.choice((2**63 - 1, 2**64 - 1, 10**15, 2**40, random.getrandbits(64)))
                content[at : at + 8] = value.to_bytes(8, random.choice(("little", "big")))
            case "repeat":
                content[at:at] = content[at : at + count]
            case "lose":
                del content[at : at + count]
            case "zero":
                content[at : at + count] = bytes(count)
            case "noise":
                content[at : at + count] = random.randbytes(count)
            case "join":
                content[at:] = any_plain(random)[2]
    return extension, bytes(content)


def lying(random: Random) -> tuple[str, bytes]:
    """(extension, contents) of a file that claims sizes, rates or channels which are not there."""
    container, encoding, extension = random.choice([each for each in ENCODINGS if each[0] in _FIELDS])
    content = bytearray(plain(container, encoding, random.randrange(6)))
    for _ in range(random.choice((1, 1, 2))):
        tag, offset, size, order = random.choice(_FIELDS[container])
        places = [at for at in range(len(content)) if content.startswith(tag, at)]
        if places:
            at = random.choice((places[0], places[-1])) + offset
            value = random.choice(
                (*_CLAIMS, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), random.getrandbits(8 * size))
            )
            content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, order)
    return extension, _with_checksums(bytes(content)) if container == "OGG" else bytes(content)


def odd(random: Random) -> tuple[str, bytes]:
    """(extension, contents) of a correct file of an odd rate, width or length, or with odd samples."""
    rate = random.choice((*_RATES, 16000, 16000, 32000, random.randrange(1, 800_000)))
    channels = random.choice((*_CHANNELS, 1, 1, 1))
    frames = random.choice((0, 1, 1, 2, 3, 100 if rate > 50 else 10))
    samples = recording(random.randrange(6), 1)[:frames].repeat(channels, axis=1).astype(np.float64)
    encoding = random.choice(("FLOAT", "DOUBLE", "PCM_16", "PCM_U8"))
    value = random.choice((None, None, np.nan, np.inf, -np.inf, 3e38, 1e300, 5e-324, 1e-40, 1e10, 0.0, 1.0))
    if value is not None:
        encoding = random.choice(("FLOAT", "DOUBLE"))
        if random.random() < 0.5:
            samples[:] = value
        elif samples.size:
            samples.flat[random.randrange(samples.size)] = value
    with np.errstate(over="ignore"):
        content = encode(samples, rate, random.choice(("WAV", "W64", "RF64")), encoding)
    return "wav", content


def _with_checksums(content: bytes, serial: int | None = None) -> bytes:
    """Ogg pages with their checksums put right, so that decoders believe what the headers say."""
    pages = content.split(b"OggS")
    for number, page in enumerate(pages[1:], 1):
        if len(page) > 22:
            if serial is not None:
                page = page[:10] + struct.pack("<I", serial) + page[14:]
            blank = b"OggS" + page[:18] + bytes(4) + page[22:]
            pages[number] = page[:18] + struct.pack("<I", _ogg_checksum(blank)) + page[22:]
    return b"OggS".join(pages)


def _ogg_checksum(page: bytes) -> int:
    remainder = 0
    for byte in page:
        remainder = (remainder << 8 & 0xFFFFFFFF) ^ _OGG_TABLE[remainder >> 24 ^ byte]
    return remainder


def _ogg_entry(byte: int) -> int:
    entry = byte << 24
    for _ in range(8):
        entry = entry << 1 & 0xFFFFFFFF ^ (0x04C11DB7 if entry & 0x80000000 else 0)
    return entry


_OGG_TABLE = [_ogg_entry(byte) for byte in range(256)]
