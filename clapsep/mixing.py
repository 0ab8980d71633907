"""Mixtures at a given signal-to-noise ratio, made on the fly from a target and an interference.

The protocol is that of the CLAPSep paper (Ma et al., 2024, section IV-A) and of AudioSep before it: the
target keeps its level, and the interference is scaled so that

    10 * log10(energy(target) / energy(interference)) = snr_db

over the whole length of the target, all channels together, for files of any length in constant memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType

import numpy as np

from clapsep.audio import AudioError, Recording, StreamResampler

_SHORT_FRAMES = 1 << 16
_LOUDEST = float(np.finfo(np.float32).max) / 2


def interference_gain(target_energy: float, interference_energy: float, snr_db: float) -> float:
    """The factor on the interference that puts the target `snr_db` decibels above it.

    Energies are sums of squared samples over the same span. Raises ValueError when one of them is not
    positive: no gain can then reach the ratio. Infinite where the gain is beyond the floats.
    """
    if not (target_energy > 0 and interference_energy > 0):
        raise ValueError(
            f"target energy {target_energy:g} and interference energy {interference_energy:g} must both be "
            f"positive to mix at {snr_db:g} dB: a silent recording has no signal-to-noise ratio"
        )
    with np.errstate(over="ignore"):
        return float(np.sqrt(target_energy / interference_energy) * np.float64(10.0) ** (-snr_db / 20.0))


class Mixture:
    """A source (the protocol of `audio.Recording`) whose blocks are (target + interference, target).

    The result has the target's sample rate, channel count and length; `start` and `duration` (seconds)
    choose a segment of the target. The interference is resampled to the target's rate, its channels are
    averaged and given to every channel unless the counts agree, it is repeated from its beginning when
    it is shorter than the target and cut when it is longer. Both files are read twice: once for the
    energies, once for the blocks. Samples beyond +-1 are kept: a mixture is float, never clipped.

    Entering raises AudioError when a file cannot be read, is empty, or is silent over the segment.
    """

    def __init__(
        self,
        target_uri: str,
        interference_uri: str,
        snr_db: float = 0.0,
        start: float = 0.0,
        duration: float | None = None,
    ) -> None:
        self.target_uri = target_uri
        self.interference_uri = interference_uri
        self.snr_db = snr_db
        self.start = start
        self.duration = duration

    def __enter__(self) -> Mixture:
        with self._open_target() as target:
            self.sample_rate: int = target.sample_rate
            self.channels: int = target.channels
            self.frames: int = target.frames
        target_energy = interference_energy = 0.0
        for target_block, interference_block in self._aligned():
            target_energy += float(np.square(target_block, dtype=np.float64).sum())
            copies = self.channels // interference_block.shape[1]
            interference_energy += copies * float(np.square(interference_block, dtype=np.float64).sum())
        for uri, energy in ((self.target_uri, target_energy), (self.interference_uri, interference_energy)):
            if not energy > 0:
                raise AudioError(
                    f"{uri}: silent over the mixed segment, cannot be mixed at {self.snr_db:g} dB"
                )
        self.gain = interference_gain(target_energy, interference_energy, self.snr_db)
        # No sample is larger than the root of the energy.
        if max(self.gain, self.gain * interference_energy**0.5) > _LOUDEST:
            raise AudioError(
                f"{self.interference_uri}: at snr_db={self.snr_db:g} its samples pass 32-bit floats"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing stays open between passes."""

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(mixture, target) blocks, float32, each (frames, channels)."""
        gain = np.float32(self.gain)
        for target_block, interference_block in self._aligned():
            yield target_block + gain * interference_block, target_block

    def _open_target(self) -> Recording:
        return Recording(self.target_uri, start=self.start, duration=self.duration)

    def _aligned(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with ExitStack() as stack:
            target = stack.enter_context(self._open_target())
            endless = self._interference()
            stack.callback(endless.close)
            ahead: list[np.ndarray] = []
            held = 0
            for target_block, _ in target.blocks():
                while held < len(target_block):
                    ahead.append(next(endless))
                    held += len(ahead[-1])
                joined = np.concatenate(ahead)
                ahead = [joined[len(target_block) :]]
                held -= len(target_block)
                yield target_block, joined[: len(target_block)]

    def _interference(self) -> Iterator[np.ndarray]:
        """Blocks of the interference at the target's rate, over and over; of the target's channels or one."""
        once: list[np.ndarray] = []
        while True:
            produced = 0
            for block in self._interference_once():
                produced += len(block)
                if produced <= _SHORT_FRAMES:
                    once.append(block)
                yield block
            if produced == 0:
                raise AudioError(f"{self.interference_uri}: too short to be mixed, no sample is left of it")
            if produced <= _SHORT_FRAMES:
                # To open the file for each repetition of a few samples would take for ever.
                repeated = np.tile(np.concatenate(once), (_SHORT_FRAMES // produced, 1))
                while True:
                    yield repeated

    def _interference_once(self) -> Iterator[np.ndarray]:
        with Recording(self.interference_uri) as recording:
            channels = self.channels if recording.channels == self.channels else 1
            resampler = StreamResampler(channels, recording.sample_rate, self.sample_rate)
            for block, _ in recording.blocks():
                fitting = block if recording.channels == self.channels else block.mean(axis=1, keepdims=True)
                yield from resampler.process(fitting)
            yield resampler.finish()
