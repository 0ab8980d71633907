"""The mask estimator: encoder features and a condition to a spectrogram mask.

Stage 0 is the deepest, as in the published state dict (`decoder_model`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep.config import EncoderConfig, ModelConfig
from clapsep.htsat import SwinBlock


class Film(nn.Module):
    """Feature-wise linear modulation: gamma(condition) * tokens + beta(condition)."""

    def __init__(self, condition_dim: int, width: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(condition_dim, width)
        self.beta = nn.Linear(condition_dim, width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.gamma(condition)[:, None] * tokens + self.beta(condition)[:, None]


class ConditionedProjection(nn.Module):
    """An encoder feature, projected, modulated by the condition and added to the decoder's state.

    `feature_proj` is for the caller to apply: it is the same for all queries of a mixture.
    """

    def __init__(self, condition_dim: int, width: int) -> None:
        super().__init__()
        self.feature_proj = nn.Linear(width, width)
        self.skip_conv = Film(condition_dim, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, projected: Tensor, condition: Tensor, state: Tensor | None = None) -> Tensor:
        """(B, patches, width), (B, condition_dim), (B, patches, width) or None -> (B, patches, width)."""
        tokens = self.skip_conv(projected, condition)
        return self.norm(tokens if state is None else tokens + state)


class PatchExpand(nn.Module):
    """Doubles the grid's side and halves its channels: the inverse of patch merging."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.expand = nn.Linear(width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(width // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, side * side, width) -> (B, 4 * side * side, width / 2)."""
        batch, _, width = tokens.shape
        grid = self.expand(tokens).view(batch, self.side, self.side, 2, 2, width // 2)
        # Sub-pixels come column by column, as patch merging took them.
        grid = grid.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, width // 2)
        return self.norm(grid)


class DecoderStage(nn.Module):
    """Expansion (all stages but the deepest), then Swin blocks without shift."""

    def __init__(self, width: int, side: int, depth: int, heads: int, window: int, expand: bool) -> None:
        super().__init__()
        self.downsample = PatchExpand(2 * width, side // 2) if expand else None
        # The published decoder has one block per stage, so none of its blocks is ever shifted.
        self.blocks = nn.ModuleList(
            SwinBlock(width, side, heads, window, shifted=index % 2 == 1) for index in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        if self.downsample is not None:
            tokens = self.downsample(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class InversePatchEmbed(nn.Module):
    """Tokens of the finest grid back to one value per mel band and frame."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.embed)
        self.proj = nn.ConvTranspose2d(config.embed, 1, config.patch, config.patch)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, patches, embed) -> (B, config.frames, mel_bins)."""
        config = self.config
        side = config.grids[0]
        image = self.proj(self.norm(tokens).transpose(1, 2).unflatten(2, (side, side)))
        segments = image.view(-1, config.segments, config.mel_bins, config.spec_size)
        return segments.transpose(2, 3).reshape(-1, config.frames, config.mel_bins)


class MaskerLayer(nn.TransformerEncoderLayer):
    """torch's default encoder layer (post-norm, ReLU), with fused attention in evaluation too.

    torch's own fast path computes the softmax explicitly, which is slower on a thousand frames.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, frames, width) -> the same shape."""
        attention = self.self_attn
        qkv = F.linear(frames, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        frames = self.norm1(frames + attention.out_proj(attended))
        return self.norm2(frames + self.linear2(F.relu(self.linear1(frames))))


class Masker(nn.Module):
    """Transformer over the frames of a window, without positional encoding."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MaskerLayer(width, heads) for _ in range(layers))

    def forward(self, frames: Tensor) -> Tensor:
        """(B, frames, width) -> the same shape."""
        for layer in self.layers:
            frames = layer(frames)
        return frames


class DecoderInputs(NamedTuple):
    """What the decoder takes from mixtures; it does not depend on the query.

    Attributes:
        projections: encoder features after their projections, deep to shallow, (B, patches, width) each.
        frames: (B, frames, masker_width), the magnitude's share of what enters the masker.
    """

    projections: tuple[Tensor, ...]
    frames: Tensor

    def at(self, index: Tensor) -> DecoderInputs:
        """Those of the mixtures numbered by `index`, (N,) int64 in 0..B-1; repeats are allowed."""
        return DecoderInputs(tuple(p[index] for p in self.projections), self.frames[index])


class Decoder(nn.Module):
    """Mask estimator of CLAPSep (arXiv 2402.17455, section 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        encoder, decoder = config.encoder, config.decoder
        self.symmetric = config.symmetric
        widths, grids, heads = encoder.widths[::-1], encoder.grids[::-1], encoder.heads[::-1]
        self.film = ConditionedProjection(config.condition_dim, widths[0])
        self.skip = nn.ModuleList(ConditionedProjection(config.condition_dim, width) for width in widths)
        self.layers = nn.ModuleList(
            DecoderStage(width, side, depth, head, encoder.window, expand=index > 0)
            for index, (width, side, depth, head) in enumerate(
                zip(widths, grids, decoder.depths, heads, strict=True)
            )
        )
        self.inverse_patch_embed = InversePatchEmbed(encoder)
        bins = config.spectrogram.bins
        self.spec_norm = nn.BatchNorm2d(bins)
        width = decoder.masker_width
        self.mask_net = nn.Sequential(
            nn.Linear(bins + encoder.mel_bins, width),
            nn.LayerNorm(width),
            Masker(width, decoder.masker_heads, decoder.masker_layers),
            nn.Linear(width, bins),
        )

    def prepare(self, magnitude: Tensor, features: Sequence[Tensor]) -> DecoderInputs:
        """Do what is the same for all queries of a mixture.

        Args:
            magnitude: (B, frames, bins) linear magnitude of the mixture.
            features: `Htsat.features` of the mixture, shallow to deep.
        """
        projections = [
            projection.feature_proj(feature)
            for projection, feature in zip((self.film, *self.skip), reversed(features), strict=True)
        ]
        normalised = self.spec_norm(magnitude.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        entry = self.mask_net[0]
        bins = normalised.shape[-1]
        return DecoderInputs(tuple(projections), F.linear(normalised, entry.weight[:, :bins], entry.bias))

    def forward(self, inputs: DecoderInputs, condition: Tensor) -> Tensor:
        """Estimate masks, one query for each mixture: (B, condition_dim) -> (B, frames, bins) in 0..1."""
        return self.mask(inputs.frames, *(self.bands(inputs, asked) for asked in self.asked(condition)))

    def asked(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Conditions that a mask is estimated from: as given and, if symmetric, with its sides swapped."""
        if not self.symmetric:
            return (condition,)
        positive, negative = condition.chunk(2, dim=1)
        return condition, torch.cat([negative, positive], dim=1)

    def bands(self, inputs: DecoderInputs, condition: Tensor) -> Tensor:
        """What the stages make of a query, (B, condition_dim) -> (B, frames, mel_bins)."""
        deepest, *skips = inputs.projections
        state = self.film(deepest, condition)
        for layer, skip, projected in zip(self.layers, self.skip, skips, strict=True):
            state = skip(projected, condition, layer(state))
        return self.inverse_patch_embed(state)[:, : inputs.frames.shape[1]]

    def mask(self, frames: Tensor, bands: Tensor, swapped: Tensor | None = None) -> Tensor:
        """Masks (B, frames, bins) in 0..1 of `DecoderInputs.frames` and the `bands` of what is `asked`."""
        logits = self._logits(frames, bands)
        if swapped is not None:
            logits = (logits - self._logits(frames, swapped)) / 2
        return torch.sigmoid(logits)

    def _logits(self, frames: Tensor, bands: Tensor) -> Tensor:
        entry, *rest = self.mask_net
        frames = frames + F.linear(bands, entry.weight[:, -bands.shape[-1] :])
        for layer in rest:
            frames = layer(frames)
        return frames
