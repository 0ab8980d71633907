"""A tiny bundle, manifests of real recordings, and runs of `fit` in processes that kill themselves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch

from clapsep import bundle
from clapsep.clap import Clap
from clapsep.config import MINI, ModelConfig
from clapsep.model import ClapSep
from clapsep.training import finetune, fit, tokens

AUDIO = Path(__file__).parents[2] / "manifests" / "audio"
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])
PATIENCE_S = 300

RECORDINGS = {
    "man_speaking.flac": ["a man speaking", "speech"],
    "drums.flac": ["drums"],
    "birds.flac": ["birds singing"],
    "violin.flac": ["a violin"],
    # 48 kHz, stereo.
    "speech_of_it_48k_stereo.flac": ["a woman speaking"],
}
WORDS = ["a", "man", "woman", "speaking", "speech", "drums", "birds", "singing", "violin"]


def tiny_config() -> ModelConfig:
    """The mini architecture at a size for tests: windows of a second."""
    encoder = replace(MINI.encoder, embed=8, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8))
    decoder = replace(MINI.decoder, masker_width=32, masker_heads=4)
    text = replace(MINI.text, width=16, feed_forward=32, max_tokens=8)
    return replace(MINI, window_seconds=1.0, joint=16, encoder=encoder, decoder=decoder, text=text)


def write_bundle(folder: Path) -> Path:
    """A bundle of random weights."""
    torch.manual_seed(0)
    config = tiny_config()
    tokenizer = tokens.build_tokenizer(WORDS, config.text.max_tokens)
    card = {"name": "tiny", "licence": "none", "vocabulary": WORDS}
    bundle.save(str(folder), ClapSep(config), Clap(config), tokenizer, card)
    return folder


def write_manifest(path: Path, rows: list[dict] | None = None) -> Path:
    """A JSONL manifest; by default of `RECORDINGS`."""
    rows = rows or [
        {"target": str(AUDIO / name), "positive_text": texts, "duration": 4.0}
        for name, texts in RECORDINGS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tune(bundle_folder: Path, manifest: Path, out: Path, **settings) -> str:
    """`fit` with six batches of two in three validations, unless `settings` say otherwise."""
    given = {"epochs": 3, "epoch_steps": 2, "batch": 2, "rank": 2} | settings
    return finetune.fit(str(manifest), str(manifest), str(bundle_folder), out, **given)


def tune_and_die(when: str, bundle_folder: Path, manifest: Path, out: Path, **settings) -> int:
    """The same in a process that is killed `when`, step:NUMBER or validation:NUMBER; its exit code."""
    process = FORKED.Process(target=_doomed, args=(when, bundle_folder, manifest, out, settings))
    process.start()
    process.join(PATIENCE_S)
    return process.exitcode


def _doomed(when: str, *arguments) -> None:
    *places, settings = arguments
    kind, number = when.split(":")

    def die_at(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def method(self, *given):
            step = (given[0] if kind == "validation" else self).global_step
            if step == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *given)

        setattr(owner, name, method)

    if kind == "step":
        die_at(fit.SeparatorTraining, "on_train_batch_start")
    else:
        # The last of what a validation does, before the checkpoint that a run resumes from.
        die_at(fit.ModelCheckpoint, "on_train_epoch_end")
    tune(*places, **settings)


def tiny_mini() -> ModelConfig:
    """The embedded default's configuration, narrow enough to train in a test."""
    encoder = replace(MINI.encoder, embed=8, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8))
    decoder = replace(MINI.decoder, masker_width=32, masker_heads=4)
    text = replace(MINI.text, width=16, feed_forward=32)
    return replace(MINI, joint=16, encoder=encoder, decoder=decoder, text=text)
