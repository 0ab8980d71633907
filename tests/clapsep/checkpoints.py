"""Files as their authors publish them, with regenerated weights, for the conversion tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer

from tests.golden import checkpoint

SENTENCES = ["a dog barking in the rain", "traffic noise and a siren", "someone plays the piano", "footsteps"]


def write_clap(path: Path, size: str) -> Path:
    """LAION-CLAP's layout: a training checkpoint, with numpy scalars beside the state dict."""
    content = {
        "epoch": np.int64(15),
        "name": "2023-04-07-music",
        "state_dict": checkpoint(size, "a"),
        "best_metric": np.float64(0.9014),
        "lr": np.float32(1e-4),
    }
    torch.save(content, path)
    return path


def write_clapsep(path: Path, size: str) -> Path:
    """CLAPSep's layout: a flat state dict."""
    torch.save(checkpoint(size, "b"), path)
    return path


def write_tokenizer(folder: Path, vocabulary: int = 600) -> Path:
    """A byte-level BPE with RoBERTa's special tokens, as `vocab.json` and `merges.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        SENTENCES,
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    tokenizer.save_model(str(folder))
    return folder
