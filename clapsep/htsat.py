"""HTSAT: a Swin transformer over a log-mel image, with laion-clap's parameter names.

Tokens of a (side, side) patch grid are kept as (B, side * side, channels) between modules, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep.config import EncoderConfig
from clapsep.spectral import LogMel, Stft

SHIFT_MASK = -100.0
"""Added to attention scores between patches that only the cyclic shift made neighbours."""


class WindowAttention(nn.Module):
    """Self-attention within windows of `window` x `window` patches, with relative position bias."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        offsets = [axis.flatten()[:, None] - axis.flatten() + window - 1 for axis in (rows, columns)]
        index = offsets[0] * (2 * window - 1) + offsets[1]
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, tokens: Tensor, shift_mask: Tensor | None) -> Tensor:
        """(B * windows, patches, width), (windows, patches, patches) or None -> as `tokens`."""
        count, patches, width = tokens.shape
        qkv = self.qkv(tokens).view(count, patches, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if shift_mask is not None:
            windows = shift_mask.shape[0]
            bias = (bias + shift_mask[:, None]).repeat(count // windows, 1, 1, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(attended.transpose(1, 2).reshape(count, patches, width))


class Mlp(nn.Module):
    """Two-layer GELU perceptron."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP on a (side, side) grid; `shifted` rolls it by half a window.

    `drop_path` is for training: the probability that an example skips an update (stochastic depth, Huang et
    al., 2016).
    """

    drop_path = 0.0

    def __init__(self, width: int, side: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.side = side
        self.window = min(window, side)
        # A grid of a single window has nothing to shift.
        self.shift = window // 2 if shifted and side > window else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, self.window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.register_buffer("attn_mask", self._shift_mask() if self.shift else None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, side * side, width) -> the same shape."""
        batch, _, width = tokens.shape
        grid = self.norm1(tokens).view(batch, self.side, self.side, width)
        if self.shift:
            grid = grid.roll((-self.shift, -self.shift), (1, 2))
        attended = self.attn(self._to_windows(grid), self.attn_mask)
        grid = self._from_windows(attended, batch)
        if self.shift:
            grid = grid.roll((self.shift, self.shift), (1, 2))
        tokens = tokens + self._kept(grid.reshape(batch, -1, width))
        return tokens + self._kept(self.mlp(self.norm2(tokens)))

    def _kept(self, update: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return update
        kept = torch.rand(len(update), 1, 1, device=update.device) >= self.drop_path
        return update * kept / (1.0 - self.drop_path)

    def _to_windows(self, grid: Tensor) -> Tensor:
        batch, side, _, width = grid.shape
        count = side // self.window
        windows = grid.view(batch, count, self.window, count, self.window, width)
        return windows.transpose(2, 3).reshape(batch * count * count, self.window * self.window, width)

    def _from_windows(self, windows: Tensor, batch: int) -> Tensor:
        count = self.side // self.window
        grid = windows.view(batch, count, count, self.window, self.window, -1)
        return grid.transpose(2, 3).reshape(batch, self.side, self.side, -1)

    def _shift_mask(self) -> Tensor:
        """(windows, patches, patches): `SHIFT_MASK` between patches of different image regions."""
        position = torch.arange(self.side)
        band = (position >= self.side - self.window).int() + (position >= self.side - self.shift).int()
        regions = (3 * band[:, None] + band).view(1, self.side, self.side, 1)
        labels = self._to_windows(regions)[..., 0]
        return SHIFT_MASK * (labels[:, :, None] != labels[:, None, :]).float()


class PatchMerging(nn.Module):
    """Halves the grid's side and doubles its channels."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, side * side, width) -> (B, side * side / 4, 2 * width)."""
        batch, _, width = tokens.shape
        grid = tokens.view(batch, self.side // 2, 2, self.side // 2, 2, width)
        # The published order of the four neighbours is column by column.
        neighbours = grid.permute(0, 1, 3, 4, 2, 5).reshape(batch, -1, 4 * width)
        return self.reduction(self.norm(neighbours))


class Stage(nn.Module):
    """Swin blocks, every second one shifted, and the merging that follows them."""

    def __init__(self, width: int, side: int, depth: int, heads: int, window: int, merge: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(width, side, heads, window, shifted=index % 2 == 1) for index in range(depth)
        )
        self.downsample = PatchMerging(width, side) if merge else None

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens if self.downsample is None else self.downsample(tokens)


class PatchEmbed(nn.Module):
    """Non-overlapping patches of the image to tokens."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, config.embed, config.patch, config.patch)
        self.norm = nn.LayerNorm(config.embed)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, spec_size, spec_size) -> (B, patches, embed)."""
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


class Htsat(nn.Module):
    """The audio encoder of both the CLAP audio tower and the separator."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.stft = Stft(config.spectrogram)
        self.log_mel = LogMel(config)
        self.bn0 = nn.BatchNorm2d(config.mel_bins)
        self.patch_embed = PatchEmbed(config)
        last = len(config.depths) - 1
        stages = zip(config.widths, config.grids, config.depths, config.heads, strict=True)
        self.layers = nn.ModuleList(
            Stage(width, side, depth, heads, config.window, merge=index < last)
            for index, (width, side, depth, heads) in enumerate(stages)
        )
        self.norm = nn.LayerNorm(config.widths[-1])
        self.apply(initialise)

    def power(self, waveform: Tensor) -> Tensor:
        """(B, samples) at the encoder's rate -> power spectrogram (B, frames, bins)."""
        spectrum = torch.view_as_real(self.stft(waveform))
        return spectrum.square().sum(-1)

    def normalised_log_mel(self, power: Tensor) -> Tensor:
        """(B, frames, bins) -> (B, frames, mel_bins), after the batch norm over mel bands."""
        log_mel = self.log_mel(power).transpose(1, 2)
        return self.bn0(log_mel[..., None])[..., 0].transpose(1, 2)

    def image(self, log_mel: Tensor) -> Tensor:
        """(B, config.frames, mel_bins) -> (B, 1, spec_size, spec_size), time segments stacked."""
        config = self.config
        segments = log_mel.view(-1, config.segments, config.spec_size, config.mel_bins)
        return segments.transpose(2, 3).reshape(-1, 1, config.spec_size, config.spec_size)

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Patch embedding and every stage's output, shallow to deep, each (B, patches, channels)."""
        tokens = self.patch_embed(image)
        collected = [tokens]
        for layer in self.layers:
            tokens = layer(tokens)
            collected.append(tokens)
        return tuple(collected)


def initialise(module: nn.Module) -> None:
    """Swin's initialisation: Linear weights from N(0, 0.02) truncated at 2, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
