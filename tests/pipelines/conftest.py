from __future__ import annotations

import pytest
import soundfile
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from clapsep import bundle
from clapsep.clap import Clap
from clapsep.config import DecoderConfig, EncoderConfig, ModelConfig, TextConfig
from clapsep.model import ClapSep
from tests.regenerate import signal

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "dog", "rain", "bell"]
CONFIG = ModelConfig(
    name="random",
    window_seconds=2.5,
    joint=16,
    encoder=EncoderConfig(spec_size=128, embed=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8)),
    text=TextConfig(vocabulary=len(WORDS), width=16, layers=1, heads=2, feed_forward=32),
    decoder=DecoderConfig(masker_width=32, masker_layers=1, masker_heads=4),
)


def write_bundle(folder, seed: int) -> str:
    """A bundle of the real architecture, small, with random weights: it separates nothing, but quickly."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    card = {"name": f"random-{seed}", "vocabulary": WORDS[4:]}
    bundle.save(str(folder), ClapSep(CONFIG), Clap(CONFIG), tokenizer, card)
    return str(folder)


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory) -> str:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "random", seed=1)


@pytest.fixture(scope="session")
def audio(tmp_path_factory):
    """A folder of recordings: stereo 44.1 kHz, mono 16 kHz, and what pairs with them."""
    folder = tmp_path_factory.mktemp("audio")
    for name, rate, seconds in (("street", 44100, 4.0), ("room", 16000, 3.0), ("dog", 16000, 3.0)):
        soundfile.write(folder / f"{name}.wav", 0.3 * signal(name, rate, seconds), rate, "PCM_16")
    return folder
