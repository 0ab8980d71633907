"""Front ends: STFT and its inverse, the mel filterbank, and the 32 -> 48 kHz resampler.

Equal to what the published model was trained with (torchlibrosa's convolution DFT, librosa's mel
filters, torchaudio's windowed-sinc resampler), computed with FFTs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep.config import EncoderConfig, SpectrogramConfig

LOG_MEL_FLOOR = 1e-10
"""Smallest mel power, -100 dB (torchlibrosa `LogmelFilterBank`, amin)."""


class Stft(nn.Module):
    """Centred, reflect-padded Hann STFT and its inverse.

    The shortest signal is `n_fft // 2 + 1` samples (reflect padding needs as many).
    """

    def __init__(self, config: SpectrogramConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, samples) float32 -> (B, frames, bins) complex64."""
        spectrum = torch.stft(
            waveform,
            self.config.n_fft,
            self.config.hop,
            window=self.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        return spectrum.transpose(1, 2)

    def inverse(self, spectrum: Tensor, samples: int) -> Tensor:
        """(B, frames, bins) complex64 -> (B, samples) float32."""
        return torch.istft(
            spectrum.transpose(1, 2), self.config.n_fft, self.config.hop, window=self.window, length=samples
        )


class LogMel(nn.Module):
    """Power spectrogram to log-mel in dB, floor -100 dB, reference 1.0."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.register_buffer("filters", mel_filters(config), persistent=False)

    def forward(self, power: Tensor) -> Tensor:
        """(..., bins) -> (..., mel_bins), dB."""
        return 10.0 * torch.log10(torch.clamp(power @ self.filters, min=LOG_MEL_FLOOR))


def mel_filters(config: EncoderConfig) -> Tensor:
    """Triangular mel filters on Slaney's scale with Slaney's area norm (librosa `filters.mel`).

    Returns:
        (bins, mel_bins) float32.
    """
    spectrogram = config.spectrogram
    frequencies = torch.linspace(0, spectrogram.sample_rate / 2, spectrogram.bins, dtype=torch.float64)
    low, high = (_hertz_to_mel(edge) for edge in (config.f_min, config.f_max))
    edges = _mel_to_hertz(torch.linspace(low, high, config.mel_bins + 2, dtype=torch.float64))
    widths = edges.diff()
    rising = (frequencies[:, None] - edges[:-2]) / widths[:-1]
    falling = (edges[2:] - frequencies[:, None]) / widths[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (2 / (edges[2:] - edges[:-2]))).float()


# Slaney's Auditory Toolbox: linear below 1 kHz (3 mel per 200 Hz), then 27 mel per factor 6.4.
_HERTZ_PER_MEL = 200 / 3
_LOG_START_HERTZ = 1000.0
_LOG_START_MEL = _LOG_START_HERTZ / _HERTZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27


def _hertz_to_mel(hertz: float) -> float:
    if hertz < _LOG_START_HERTZ:
        return hertz / _HERTZ_PER_MEL
    return _LOG_START_MEL + math.log(hertz / _LOG_START_HERTZ) / _LOG_STEP


def _mel_to_hertz(mel: Tensor) -> Tensor:
    logarithmic = _LOG_START_HERTZ * torch.exp(_LOG_STEP * (mel - _LOG_START_MEL))
    return torch.where(mel < _LOG_START_MEL, mel * _HERTZ_PER_MEL, logarithmic)


class Resampler(nn.Module):
    """Windowed-sinc resampler between two fixed rates.

    Hann window, 6 zero crossings, roll-off 0.99 of the lower Nyquist frequency: the defaults of
    torchaudio `functional.resample`, which the published model hears its mixtures through.
    """

    ZERO_CROSSINGS = 6
    ROLLOFF = 0.99

    def __init__(self, from_rate: int, to_rate: int) -> None:
        super().__init__()
        divisor = math.gcd(from_rate, to_rate)
        self.step_in, self.step_out = from_rate // divisor, to_rate // divisor
        cutoff = min(self.step_in, self.step_out) * self.ROLLOFF
        self.reach = math.ceil(self.ZERO_CROSSINGS * self.step_in / cutoff)
        taps = torch.arange(-self.reach, self.reach + self.step_in, dtype=torch.float64) / self.step_in
        phases = -torch.arange(self.step_out, dtype=torch.float64) / self.step_out
        times = ((phases[:, None] + taps) * cutoff).clamp(-self.ZERO_CROSSINGS, self.ZERO_CROSSINGS)
        window = torch.cos(times * (math.pi / (2 * self.ZERO_CROSSINGS))) ** 2
        kernel = torch.sinc(times) * window * (cutoff / self.step_in)
        self.register_buffer("kernel", kernel.float()[:, None], persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, samples) -> (B, ceil(samples * to_rate / from_rate))."""
        samples = waveform.shape[-1]
        padded = F.pad(waveform[:, None], (self.reach, self.reach + self.step_in))
        phases = F.conv1d(padded, self.kernel, stride=self.step_in)
        length = -(-samples * self.step_out // self.step_in)
        return phases.transpose(1, 2).flatten(1)[:, :length]
