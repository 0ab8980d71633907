"""Separation measures as streaming, mergeable accumulators.

Two definitions share the name "SDR" in the literature. `sdr` here is BSS-Eval's (Vincent et al. 2006, as in
torchmetrics and mir_eval): the target may be distorted by a filter of 512 taps before what is left counts as
error. `snr` is the plain energy ratio, which AudioSep calls SDR. `si_sdr` (Le Roux et al. 2019, without mean
removal) allows a gain only. The `i` forms are stem minus mixture, in dB.

Everything is accumulated in float64, per channel. A value is the mean over the channels where it is defined.
Where it is defined in none it is None, and `metrics_reason` says why; it is never NaN or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg import LinAlgError, solve_toeplitz

FILTER_TAPS = 512
# Beyond this, float32 samples and float64 sums leave only rounding: the signals are the same, or unrelated.
LIMIT_DB = 100.0
# Relative to the target's energy. Keeps the 512 equations solvable for band-limited targets, whose
# autocorrelation is singular; it moves an SDR of 80 dB by less than 1e-3 dB.
DIAGONAL_LOAD = 1e-12
ACTIVE_LEVEL = 10 ** (-60 / 20)
CHUNK_SAMPLES = 1 << 15

SILENT_TARGET = "the target is silent"
SILENT_STEM = "the stem is silent"
SILENT_MIXTURE = "the mixture is silent"
TOO_SHORT = f"fewer than {FILTER_TAPS + 1} samples"
EXACT = f"above {LIMIT_DB:.0f} dB: no error that could be measured"
UNRELATED = f"below -{LIMIT_DB:.0f} dB: no target that could be measured"
NOT_FINITE = "samples are not finite"
SINGULAR = "the distortion filter has no solution"
NO_TARGET = "the row has no target"

DEFINITIONS = {
    "sdr": "dB; BSS-Eval signal-to-distortion ratio of the stem, 512-tap distortion filter (torchmetrics)",
    "si_sdr": "dB; scale-invariant signal-to-distortion ratio of the stem, no mean removal",
    "snr": "dB; 10 log10(E[target^2] / E[(target - stem)^2]); AudioSep reports this as SDR",
    "mixture_sdr": "dB; sdr of the unprocessed mixture",
    "mixture_si_sdr": "dB; si_sdr of the unprocessed mixture",
    "mixture_snr": "dB; snr of the unprocessed mixture",
    "sdri": "dB; sdr - mixture_sdr (what CLAPSep reports as SDRi)",
    "si_sdri": "dB; si_sdr - mixture_si_sdr",
    "snri": "dB; snr - mixture_snr (what AudioSep reports as SDRi)",
    "metrics_reason": "why reference metrics of this row are null",
    "energy_ratio_db": "dB; energy of the stem over energy of the mixture, null where either is silent",
    "activity_ratio": "0..1; share of sample instants at which a channel of the stem exceeds -60 dBFS",
    "peak": "1.0 = full scale; largest absolute sample of the stem",
    "clipped": "samples of the stem beyond full scale, which a fixed-point file cannot hold",
}
RATIOS = ("sdr", "si_sdr", "snr")
REFERENCE_COLUMNS = tuple(DEFINITIONS)[:9]

_Outcome = tuple[float | None, str | None]


class ReferenceMetrics:
    """SDR, SI-SDR and SNR of a stem and of its mixture against the target.

    Holds 511 samples at either end and sums of fixed size, whatever the length of the recording.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.samples = 0
        lags = FILTER_TAPS
        self._target_energy = np.zeros(channels)
        # Axis 0 of these: stem, mixture.
        self._energy = np.zeros((2, channels))
        self._cross = np.zeros((2, channels))
        self._error = np.zeros((2, channels))
        # Axis 0: target (autocorrelation), then target against stem and mixture, at lags 0..511.
        self._correlation = np.zeros((3, channels, lags))
        self._head = np.zeros((3, channels, 0))
        self._tail = np.zeros((channels, 0))

    def update(self, target: np.ndarray, mixture: np.ndarray, stem: np.ndarray) -> None:
        """Add a block; each array is (samples, channels), all of one shape."""
        if not target.shape == mixture.shape == stem.shape or target.shape[1:] != (self.channels,):
            raise ValueError(
                f"expected three blocks of (samples, {self.channels}), got target {target.shape}, "
                f"mixture {mixture.shape}, stem {stem.shape}"
            )
        for first in range(0, len(target), CHUNK_SAMPLES):
            part = slice(first, first + CHUNK_SAMPLES)
            self._add(np.stack([x[part].T.astype(np.float64) for x in (target, stem, mixture)]))

    def _add(self, signals: np.ndarray) -> None:
        target, others = signals[0], signals[1:]
        self._target_energy += np.einsum("cn,cn->c", target, target)
        self._energy += np.einsum("kcn,kcn->kc", others, others)
        self._cross += np.einsum("cn,kcn->kc", target, others)
        error = target - others
        self._error += np.einsum("kcn,kcn->kc", error, error)
        self._correlation += _correlate(np.concatenate([self._tail, target], axis=-1), signals)
        missing = FILTER_TAPS - 1 - self._head.shape[-1]
        self._head = np.concatenate([self._head, signals[..., :missing]], axis=-1)
        self._tail = np.concatenate([self._tail, target], axis=-1)[:, -(FILTER_TAPS - 1) :]
        self.samples += signals.shape[-1]

    def merge(self, later: ReferenceMetrics) -> None:
        """Append what `later` accumulated from the samples that follow these."""
        if later.channels != self.channels:
            raise ValueError(f"cannot merge {later.channels} channels into {self.channels}")
        self._target_energy += later._target_energy
        self._energy += later._energy
        self._cross += later._cross
        self._error += later._error
        self._correlation += later._correlation
        # The only products neither half has seen: this tail against the first 511 samples of `later`.
        alone = np.concatenate([self._tail, np.zeros_like(later._head[0])], axis=-1)
        self._correlation += _correlate(alone, later._head)
        missing = FILTER_TAPS - 1 - self._head.shape[-1]
        self._head = np.concatenate([self._head, later._head[..., :missing]], axis=-1)
        self._tail = np.concatenate([self._tail, later._tail], axis=-1)[:, -(FILTER_TAPS - 1) :]
        self.samples += later.samples

    def result(self) -> dict[str, float | str | None]:
        """The nine ratios in dB (mean over channels, or None) and `metrics_reason` (None: all defined)."""
        columns: dict[str, list[_Outcome]] = {name: [] for name in REFERENCE_COLUMNS}
        for channel in range(self.channels):
            stem = self._ratios(channel, 0, SILENT_STEM)
            mixture = self._ratios(channel, 1, SILENT_MIXTURE)
            for name in RATIOS:
                columns[name].append(stem[name])
                columns[f"mixture_{name}"].append(mixture[name])
                columns[f"{name}i"].append(_difference(stem[name], mixture[name]))
        result: dict[str, float | str | None] = {name: _mean(found) for name, found in columns.items()}
        return result | {"metrics_reason": _reasons(columns)}

    def _ratios(self, channel: int, other: int, silent: str) -> dict[str, _Outcome]:
        target = float(self._target_energy[channel])
        energy = float(self._energy[other, channel])
        cross = float(self._cross[other, channel])
        error = float(self._error[other, channel])
        if not math.isfinite(target + energy):
            return dict.fromkeys(RATIOS, (None, NOT_FINITE))
        if target == 0:
            return dict.fromkeys(RATIOS, (None, SILENT_TARGET))
        snr = _decibels(target, error)
        if energy == 0:
            return {"sdr": (None, silent), "si_sdr": (None, silent), "snr": snr}
        explained = min(cross * cross / (target * energy), 1.0)
        return {"sdr": self._sdr(channel, other), "si_sdr": _decibels(explained, 1 - explained), "snr": snr}

    def _sdr(self, channel: int, other: int) -> _Outcome:
        if self.samples <= FILTER_TAPS:
            return None, TOO_SHORT
        target = self._target_energy[channel]
        scale = math.sqrt(target * self._energy[other, channel])
        first_row = self._correlation[0, channel] / target
        first_row[0] += DIAGONAL_LOAD
        right = self._correlation[1 + other, channel] / scale
        try:
            taps = solve_toeplitz(first_row, right)
        except LinAlgError:
            return None, SINGULAR
        explained = min(max(float(right @ taps), 0.0), 1.0)
        return _decibels(explained, 1 - explained)


class LevelMetrics:
    """Measures of a stem that need no reference."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.samples = 0
        self.clipped = 0
        self.peak = 0.0
        self._active = 0
        self._stem_energy = 0.0
        self._mixture_energy = 0.0

    def update(self, mixture: np.ndarray, stem: np.ndarray) -> None:
        """Add a block; both arrays are (samples, channels)."""
        if mixture.shape != stem.shape or stem.shape[1:] != (self.channels,):
            raise ValueError(
                f"expected two blocks of (samples, {self.channels}), "
                f"got mixture {mixture.shape}, stem {stem.shape}"
            )
        if not len(stem):
            return
        magnitude = np.abs(stem)
        self.samples += len(stem)
        self.clipped += int(np.count_nonzero(magnitude > 1))
        self.peak = max(self.peak, float(magnitude.max()))
        self._active += int(np.count_nonzero(magnitude.max(axis=1) > ACTIVE_LEVEL))
        self._stem_energy += float(np.sum(np.square(stem, dtype=np.float64)))
        self._mixture_energy += float(np.sum(np.square(mixture, dtype=np.float64)))

    def merge(self, later: LevelMetrics) -> None:
        """Append what `later` accumulated from the samples that follow these."""
        self.samples += later.samples
        self.clipped += later.clipped
        self.peak = max(self.peak, later.peak)
        self._active += later._active
        self._stem_energy += later._stem_energy
        self._mixture_energy += later._mixture_energy

    def result(self) -> dict[str, float | int | None]:
        """`energy_ratio_db`, `activity_ratio`, `peak`, `clipped` as `DEFINITIONS` has them."""
        heard = self._stem_energy > 0 and self._mixture_energy > 0
        return {
            "energy_ratio_db": 10 * math.log10(self._stem_energy / self._mixture_energy) if heard else None,
            "activity_ratio": self._active / self.samples if self.samples else None,
            "peak": self.peak,
            "clipped": self.clipped,
        }


def _correlate(target: np.ndarray, signals: np.ndarray) -> np.ndarray:
    """Sums over a block of signals[k, c, m] * target[c, m - lag], (3, channels, 512).

    `target` (channels, past + samples) ends where `signals` (3, channels, samples) end.
    """
    past = target.shape[-1] - signals.shape[-1]
    size = next_fast_len(target.shape[-1] + FILTER_TAPS - 1, real=True)
    aligned = np.concatenate([np.zeros((*signals.shape[:-1], past)), signals], axis=-1)
    return irfft(rfft(target, size).conj() * rfft(aligned, size), size)[..., :FILTER_TAPS]


def _decibels(signal: float, error: float) -> _Outcome:
    if error <= 0:
        return None, EXACT
    if signal <= 0:
        return None, UNRELATED
    value = 10 * (math.log10(signal) - math.log10(error))
    if value > LIMIT_DB:
        return None, EXACT
    if value < -LIMIT_DB:
        return None, UNRELATED
    return value, None


def _difference(stem: _Outcome, mixture: _Outcome) -> _Outcome:
    if stem[0] is None or mixture[0] is None:
        return None, stem[1] or mixture[1]
    return stem[0] - mixture[0], None


def _mean(outcomes: Sequence[_Outcome]) -> float | None:
    values = [value for value, _ in outcomes if value is not None]
    return sum(values) / len(values) if values else None


def _reasons(columns: dict[str, list[_Outcome]]) -> str | None:
    """`sdr, sdri: the stem is silent (channel 1)`, one clause per reason; channels where not all share it."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, outcomes in columns.items():
        for channel, (_, reason) in enumerate(outcomes):
            if reason is not None:
                found.setdefault(reason, {}).setdefault(name, []).append(channel)
    clauses = []
    for reason, names in found.items():
        where = sorted({channel for channels in names.values() for channel in channels})
        everywhere = all(len(channels) == len(columns[name]) for name, channels in names.items())
        suffix = "" if everywhere else f" (channel {', '.join(map(str, where))})"
        clauses.append(f"{', '.join(names)}: {reason}{suffix}")
    return "; ".join(clauses) or None
