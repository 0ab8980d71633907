"""The published CLAPSep inference written plainly, as the yardstick of `benchmarks.model`.

It does what the published code does for a clip, and in the same way: DFTs as convolutions, window attention
as explicit softmax with the bias and the shift mask added to the scores, the encoder's classification head
computed although nobody reads it, texts padded to 77 tokens. LoRA is merged once, as the published demo does.
Equal to the goldens (tests/benchmarks/test_published.py); not tuned, not to be used for anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep.config import ModelConfig, SpectrogramConfig
from clapsep.spectral import Resampler, mel_filters

SHIFT_MASK = -100.0


@dataclass(frozen=True)
class Weights:
    """A state dict seen from one of its modules."""

    tensors: Mapping[str, Tensor]
    prefix: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def at(self, *path: str | int) -> Weights:
        """The same state dict, seen from a submodule."""
        return Weights(self.tensors, self.prefix + "".join(f"{part}." for part in path))

    def get(self, name: str) -> Tensor | None:
        """A tensor, or None where the module has none of that name."""
        return self.tensors.get(self.prefix + name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply the Linear layer `name`."""
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Apply the LayerNorm `name`."""
        weight = self[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self[f"{name}.bias"])

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        """Apply the BatchNorm `name` with its running statistics over dimension 1."""
        at = self.at(name)
        return F.batch_norm(x, at["running_mean"], at["running_var"], at["weight"], at["bias"])


class ConvolutionStft:
    """STFT and inverse by convolution with the rows of the DFT matrix (as torchlibrosa does)."""

    def __init__(self, config: SpectrogramConfig) -> None:
        self.config = config
        size = config.n_fft
        self.window = torch.hann_window(size)
        steps = torch.arange(size, dtype=torch.float64)
        angle = (2 * math.pi / size) * torch.outer(steps, steps).remainder(size)
        self.real, self.imaginary = (
            (wave[: config.bins] * self.window.double()).float()[:, None]
            for wave in (torch.cos(angle), -torch.sin(angle))
        )
        self.inverse_real, self.inverse_imaginary = (
            (wave * self.window.double()[:, None] / size).float()[..., None]
            for wave in (torch.cos(angle), torch.sin(angle))
        )

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """(B, samples) -> real and imaginary part, each (B, frames, bins)."""
        half = self.config.n_fft // 2
        padded = F.pad(waveform[:, None], (half, half), mode="reflect")
        real = F.conv1d(padded, self.real, stride=self.config.hop)
        imaginary = F.conv1d(padded, self.imaginary, stride=self.config.hop)
        return real.transpose(1, 2), imaginary.transpose(1, 2)

    def inverse(self, real: Tensor, imaginary: Tensor, samples: int) -> Tensor:
        """Real and imaginary part, each (B, frames, bins) -> (B, samples)."""
        size = self.config.n_fft
        real, imaginary = real.transpose(1, 2), imaginary.transpose(1, 2)
        real = torch.cat([real, real[:, 1:-1].flip(1)], dim=1)
        imaginary = torch.cat([imaginary, -imaginary[:, 1:-1].flip(1)], dim=1)
        frames = F.conv1d(real, self.inverse_real) - F.conv1d(imaginary, self.inverse_imaginary)
        total = self._overlap_add(frames)
        weight = self._overlap_add(self.window.square()[None, :, None].expand(1, size, frames.shape[-1]))
        signal = total / weight.clamp(min=1e-11)
        return signal[:, size // 2 : size // 2 + samples]

    def _overlap_add(self, frames: Tensor) -> Tensor:
        size, hop = self.config.n_fft, self.config.hop
        length = (frames.shape[-1] - 1) * hop + size
        return F.fold(frames, (1, length), (1, size), stride=(1, hop))[:, 0, 0]


class Published:
    """Inference from the two published files.

    Args:
        clap: file a, keys without `module.`.
        clapsep: file b.
        config: their sizes.
    """

    def __init__(
        self, clap: Mapping[str, Tensor], clapsep: Mapping[str, Tensor], config: ModelConfig
    ) -> None:
        self.config = config
        self.clap = Weights(clap)
        merged = {key: value for key, value in clap.items() if key.startswith("audio_branch.")}
        for key in clapsep:
            if key.endswith(".lora_A"):
                layer = key.removesuffix(".lora_A")
                rank = clapsep[key].shape[0]
                merged[f"{layer}.weight"] = (
                    clap[f"{layer}.weight"] + clapsep[f"{layer}.lora_B"] @ clapsep[key] / rank
                )
                merged[f"{layer}.bias"] = clapsep[f"{layer}.bias"]
        self.branch = Weights(merged).at("audio_branch")
        self.decoder = Weights(clapsep).at("decoder_model")
        self.stft = ConvolutionStft(config.spectrogram)
        self.encoder_stft = ConvolutionStft(config.encoder.spectrogram)
        self.mel = mel_filters(config.encoder)
        self.resampler = Resampler(config.sample_rate, config.encoder.spectrogram.sample_rate)
        self.masker = self._masker()
        window = config.encoder.window
        place = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        offset = place[:, :, None] - place[:, None] + window - 1
        self.bias_index = offset[0] * (2 * window - 1) + offset[1]

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, 77), (B, 77) -> (B, joint) of unit norm."""
        text = self.config.text
        at = self.clap.at("text_branch", "embeddings")
        real = (input_ids != text.pad_id).long()
        hidden = at["word_embeddings.weight"][input_ids] + at["token_type_embeddings.weight"][0]
        hidden = hidden + at["position_embeddings.weight"][real.cumsum(1) * real + text.pad_id]
        hidden = at.norm("LayerNorm", hidden)
        forbidden = (1.0 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min
        for index in range(text.layers):
            layer = self.clap.at("text_branch", "encoder", "layer", index)
            query, key, value = (
                layer.linear(f"attention.self.{name}", hidden).unflatten(-1, (text.heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + forbidden
            attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
            attended = layer.linear("attention.output.dense", attended)
            hidden = layer.norm("attention.output.LayerNorm", attended + hidden)
            inner = F.gelu(layer.linear("intermediate.dense", hidden))
            hidden = layer.norm("output.LayerNorm", layer.linear("output.dense", inner) + hidden)
        pooled = torch.tanh(self.clap.linear("text_branch.pooler.dense", hidden[:, 0]))
        projected = self.clap.linear("text_projection.0", pooled)
        return F.normalize(self.clap.linear("text_projection.2", F.relu(projected)), dim=-1)

    def features(self, mixture: Tensor) -> list[Tensor]:
        """(B, samples) -> real and imaginary part, then the encoder's outputs from shallow to deep."""
        encoder = self.config.encoder
        real, imaginary = self.stft.forward(mixture)
        parts = self.encoder_stft.forward(self.resampler(mixture))
        power = parts[0] ** 2 + parts[1] ** 2
        power = F.pad(power, (0, 0, 0, encoder.frames - power.shape[1]))
        log_mel = 10.0 * torch.log10(torch.clamp(power @ self.mel, min=1e-10))
        log_mel = self.branch.batch_norm("bn0", log_mel[:, None].transpose(1, 3)).transpose(1, 3)
        segments = log_mel.transpose(2, 3).unflatten(3, (encoder.segments, encoder.spec_size))
        image = segments.transpose(2, 3).flatten(2, 3).reshape(-1, 1, encoder.spec_size, encoder.spec_size)

        patch = self.branch.at("patch_embed")
        tokens = F.conv2d(image, patch["proj.weight"], patch["proj.bias"], stride=encoder.patch)
        tokens = patch.norm("norm", tokens.flatten(2).transpose(1, 2))
        collected = [tokens]
        for stage, depth in enumerate(encoder.depths):
            layer = self.branch.at("layers", stage)
            for index in range(depth):
                tokens = self._swin(layer.at("blocks", index), tokens, encoder.heads[stage], index % 2 == 1)
            if stage < len(encoder.depths) - 1:
                tokens = self._merge(layer.at("downsample"), tokens)
            collected.append(tokens)
        self._classify(tokens)
        return [real, imaginary, *collected]

    def separate(self, features: list[Tensor], condition: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Features and (B, condition_dim) -> mask (B, frames, bins) and target (B, samples)."""
        real, imaginary, *skips, deepest = features
        magnitude = (real**2 + imaginary**2) ** 0.5
        scale = magnitude.clamp(min=1e-10)
        cosine, sine = real / scale, imaginary / scale
        decoder, encoder = self.decoder, self.config.encoder
        state = self._modulate(decoder.at("film"), deepest, condition, None)
        for stage, skip in enumerate(reversed(skips)):
            layer = decoder.at("layers", stage)
            if stage > 0:
                state = self._expand(layer.at("downsample"), state)
            state = self._swin(layer.at("blocks", 0), state, encoder.heads[-1 - stage], shifted=False)
            state = self._modulate(decoder.at("skip", stage), skip, condition, state)
        side = encoder.spec_size // encoder.patch
        at = decoder.at("inverse_patch_embed")
        grid = at.norm("norm", state).transpose(1, 2).unflatten(2, (side, side))
        image = F.conv_transpose2d(grid, at["proj.weight"], at["proj.bias"], stride=encoder.patch)
        mel = image[:, 0].unflatten(1, (encoder.segments, encoder.mel_bins)).transpose(2, 3).flatten(1, 2)
        normalised = decoder.batch_norm("spec_norm", magnitude.transpose(1, 2)).transpose(1, 2)
        joined = torch.cat([normalised, mel[:, : magnitude.shape[1]]], dim=-1)
        net = decoder.at("mask_net")
        hidden = self.masker(net.norm("1", net.linear("0", joined)))
        mask = torch.sigmoid(net.linear("3", hidden))
        target = F.relu(magnitude * mask)
        return mask, self.stft.inverse(target * cosine, target * sine, samples)

    def _swin(self, block: Weights, tokens: Tensor, heads: int, shifted: bool) -> Tensor:
        batch, count, width = tokens.shape
        side, window = math.isqrt(count), self.config.encoder.window
        shift = window // 2 if shifted and side > window else 0
        grid = block.norm("norm1", tokens).view(batch, side, side, width)
        if shift:
            grid = torch.roll(grid, (-shift, -shift), (1, 2))
        windows = self._windows(grid)
        qkv = (
            block.linear("attn.qkv", windows).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        )
        query, key, value = qkv.unbind(0)
        scores = (query * (width // heads) ** -0.5) @ key.transpose(-2, -1)
        bias = block["attn.relative_position_bias_table"][self.bias_index.view(-1)]
        scores = scores + bias.view(window**2, window**2, heads).permute(2, 0, 1).contiguous()[None]
        if shift:
            mask = self._shift_mask(side, shift)
            scores = scores.unflatten(0, (batch, -1)) + mask[None, :, None]
            scores = scores.flatten(0, 1)
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        attended = block.linear("attn.proj", attended)
        split = side // window
        grid = attended.view(batch, split, split, window, window, width).transpose(2, 3).reshape(grid.shape)
        if shift:
            grid = torch.roll(grid, (shift, shift), (1, 2))
        tokens = tokens + grid.view(batch, count, width)
        inner = F.gelu(block.linear("mlp.fc1", block.norm("norm2", tokens)))
        return tokens + block.linear("mlp.fc2", inner)

    def _windows(self, grid: Tensor) -> Tensor:
        batch, side, _, width = grid.shape
        window = self.config.encoder.window
        split = side // window
        parts = grid.view(batch, split, window, split, window, width).transpose(2, 3)
        return parts.reshape(-1, window * window, width)

    def _shift_mask(self, side: int, shift: int) -> Tensor:
        masks = self.__dict__.setdefault("_masks", {})
        if side not in masks:
            window = self.config.encoder.window
            band = torch.zeros(side)
            band[-window:-shift], band[-shift:] = 1, 2
            label = self._windows((3 * band[:, None] + band)[None, :, :, None])[..., 0]
            masks[side] = (label[:, None] != label[:, :, None]).float() * SHIFT_MASK
        return masks[side]

    def _merge(self, at: Weights, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        side = math.isqrt(count)
        grid = tokens.view(batch, side, side, width)
        corners = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        joined = torch.cat(corners, dim=-1).view(batch, -1, 4 * width)
        return at.linear("reduction", at.norm("norm", joined))

    def _expand(self, at: Weights, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        side = math.isqrt(count)
        quarters = at.linear("expand", tokens).view(batch, side, side, 2 * width).chunk(4, dim=-1)
        grid = tokens.new_empty(batch, 2 * side, 2 * side, width // 2)
        for index, quarter in enumerate(quarters):
            grid[:, index % 2 :: 2, index // 2 :: 2] = quarter
        return at.norm("norm", grid.view(batch, 4 * count, width // 2))

    @staticmethod
    def _modulate(at: Weights, feature: Tensor, condition: Tensor, state: Tensor | None) -> Tensor:
        gamma = at.linear("skip_conv.gamma", condition)[:, None]
        beta = at.linear("skip_conv.beta", condition)[:, None]
        modulated = gamma * at.linear("feature_proj", feature) + beta
        return at.norm("norm", modulated if state is None else state + modulated)

    def _classify(self, tokens: Tensor) -> Tensor:
        # laion-clap's forward pass: class scores per frame, from the map regrouped by frequency.
        branch, segments = self.branch, self.config.encoder.segments
        tokens = branch.norm("norm", tokens)
        side = math.isqrt(tokens.shape[1])
        grid = tokens.transpose(1, 2).reshape(len(tokens), -1, segments, side // segments, side)
        grid = grid.transpose(2, 3).flatten(3)
        scores = F.conv2d(grid, branch["tscam_conv.weight"], branch["tscam_conv.bias"], padding=(0, 1))
        return torch.sigmoid(scores.flatten(2)).repeat_interleave(32, dim=2)

    def _masker(self) -> nn.TransformerEncoder:
        config = self.config.decoder
        width = config.masker_width
        layer = nn.TransformerEncoderLayer(width, config.masker_heads, 4 * width, batch_first=True)
        masker = nn.TransformerEncoder(layer, config.masker_layers, enable_nested_tensor=False)
        start = "decoder_model.mask_net.2."
        state = self.decoder.tensors
        masker.load_state_dict(
            {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
        )
        return masker.eval().requires_grad_(False)
