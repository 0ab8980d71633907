"""The two CLAP towers: text and audio queries to unit vectors in one space.

Parameter names are laion-clap's (`audio_branch`, `text_branch`, `text_projection`, `audio_projection`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep.config import ModelConfig, TextConfig
from clapsep.htsat import Htsat


class Clap(nn.Module):
    """Contrastive language-audio towers (arXiv 2211.06687)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_branch = Htsat(config.encoder)
        self.text_branch = Roberta(config.text)
        self.text_projection = _projection(config.text.width, config.joint)
        self.audio_projection = _projection(config.encoder.widths[-1], config.joint)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text embeddings.

        Args:
            input_ids: (B, tokens) int64, padded with `config.text.pad_id`.
            attention_mask: (B, tokens), 1 for a token and 0 for padding.

        Returns:
            (B, joint) float32 of unit norm. How far a text is padded does not change its embedding.
        """
        pooled = self.text_branch(input_ids, attention_mask)
        return F.normalize(self.text_projection(pooled), dim=-1)

    def embed_audio(self, waveform: Tensor) -> Tensor:
        """Audio embeddings.

        Args:
            waveform: (B, samples) float32 at `config.encoder.spectrogram.sample_rate`, one whole
                window: short audio must be repeated to that length by the caller.

        Returns:
            (B, joint) float32 of unit norm.
        """
        branch = self.audio_branch
        log_mel = branch.normalised_log_mel(branch.power(waveform))
        # CLAP was trained on images stretched to full width, the separator on zero-padded ones.
        size = (branch.config.frames, branch.config.mel_bins)
        stretched = F.interpolate(log_mel[:, None], size, mode="bicubic", align_corners=True)[:, 0]
        tokens = branch.norm(branch.features(branch.image(stretched))[-1])
        return F.normalize(self.audio_projection(tokens.mean(1)), dim=-1)


def _projection(width: int, joint: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, joint), nn.ReLU(), nn.Linear(joint, joint))


class Roberta(nn.Module):
    """RoBERTa encoder with pooler (transformers `RobertaModel`, same parameter names)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer(config) for _ in range(config.layers))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.width, config.width)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, tokens), (B, tokens) -> pooled first token (B, width)."""
        hidden = self.embeddings(input_ids)
        attend = attention_mask.bool()[:, None, None, :]
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, attend)
        return torch.tanh(self.pooler["dense"](hidden[:, 0]))


class _Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.pad_id = config.pad_id
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(1, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = (input_ids != self.pad_id).long()
        # RoBERTa counts positions from pad_id + 1; padding keeps pad_id.
        positions = tokens.cumsum(1) * tokens + self.pad_id
        embedded = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.LayerNorm(embedded + self.token_type_embeddings.weight[0])


class _SelfAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor, attend: Tensor) -> Tensor:
        query, key, value = (
            linear(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attend).transpose(1, 2).flatten(2)


class _AddNorm(nn.Module):
    def __init__(self, inner: int, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, inner: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(inner) + residual)


class _Layer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": _SelfAttention(config), "output": _AddNorm(config.width, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.width, config.feed_forward)})
        self.output = _AddNorm(config.feed_forward, config)

    def forward(self, hidden: Tensor, attend: Tensor) -> Tensor:
        attended = self.attention["output"](self.attention["self"](hidden, attend), hidden)
        return self.output(F.gelu(self.intermediate["dense"](attended)), attended)
