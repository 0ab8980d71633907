"""Streaming decode, encode and resample of any URI: soundfile for formats, fsspec for places, soxr for rates.

Nothing here holds more than about a second of audio, and nothing is changed silently: what cannot be read or
stored as it is raises :class:`AudioError`, and samples a format cannot hold are counted.
"""

from clapsep.audio.blocks import AudioError
from clapsep.audio.resampling import StreamResampler
from clapsep.audio.sources import Recording, Source, Waveform
from clapsep.audio.writing import AudioWriter, encoding_of

__all__ = [
    "AudioError",
    "AudioWriter",
    "Recording",
    "Source",
    "StreamResampler",
    "Waveform",
    "encoding_of",
]
