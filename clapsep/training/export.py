"""Trained weights -> the bundle that ships, with its card, attribution and notice."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clapsep import bundle
from clapsep.config import MINI
from clapsep.model import ClapSep
from clapsep.training import corpus, split, vocabulary, voices
from clapsep.training.default import SEPARATOR
from clapsep.training.pretrain import load_towers

RUNS = Path(__file__).with_name("runs.json")
ATTRIBUTION_COLUMNS = ("source", "title", "author", "licence", "url", "source_group")

RENDERED = {
    "sf_GMbank": {
        "source": "csound-soundfont (Debian)",
        "title": "sf_GMbank.sf2, a General MIDI sound bank; random melodies and beats rendered from it",
        "author": "not named",
        "licence": "public domain",
        "url": "",
        "source_group": "sf_GMbank",
    },
    voices.SOURCE: {
        "source": "flite 2.2 (Debian)",
        "title": "the voices awb, kal16, rms and slt of a speech synthesiser; random words spoken by them",
        "author": "Carnegie Mellon University, Cepstral LLC and others",
        "licence": "BSD-like (CMU Flite)",
        "url": "http://cmuflite.org",
        "source_group": "flite",
    },
}


def export(work: Path, recordings: Path, folder: Path) -> str:
    """Write the bundle from the weights in `work`; returns its digest.

    The facts of its ATTRIBUTION.csv are those of `recordings/train_corpus/ATTRIBUTION.csv`.
    """
    clap, tokenizer = load_towers(MINI, work)
    model = ClapSep(MINI)
    model.load_state_dict(load_file(work / SEPARATOR))
    prepared = corpus.load(work / "corpus")
    attribution = attributed(prepared, recordings)
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "ATTRIBUTION.csv", attribution)
    (folder / "NOTICE").write_text(notice(attribution))
    return bundle.save(str(folder), model, clap, tokenizer, card(prepared, attribution), dtype=torch.float16)


def card(prepared: corpus.Corpus, attribution: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What `card.json` says beside the measurement."""
    seconds = {
        name: round(sum(clip.frames for clip in clips) / corpus.SAMPLE_RATE)
        for name, clips in prepared.of("train").items()
    }
    licences: dict[str, int] = {}
    for row in attribution:
        licences[row["licence"]] = licences.get(row["licence"], 0) + 1
    return {
        "name": "clapsep-mini",
        "licence": "Apache-2.0; the training recordings keep their own licences, see ATTRIBUTION.csv",
        "vocabulary": [text for name in vocabulary.CLAIMED for text in _known(name)],
        "classes": list(vocabulary.CLAIMED),
        "not_told_apart": sorted(
            " / ".join(sorted(pair)) for pair in vocabulary.NEIGHBOURS if pair <= set(vocabulary.CLAIMED)
        ),
        "training": {
            "recordings": len({clip.name for clip in prepared.clips if clip.split == "train"}),
            "seconds_per_class": seconds,
            "recordings_per_licence": licences,
            "sources_never_trained_on": sorted(split.TEST_SOURCES),
            **json.loads(RUNS.read_text()),
        },
    }


def _known(name: str) -> tuple[str, ...]:
    coarse = vocabulary.BY_NAME[name]
    members = (texts[0] for texts in coarse.members.values() if texts)
    return tuple(dict.fromkeys((coarse.wordings[0], *members)))


def attributed(prepared: corpus.Corpus, recordings: Path) -> list[dict[str, str]]:
    """One row for every original of the corpora that trained the model, or chose among its checkpoints.

    What only chose and is not of the corpora, `validation.csv` names.
    """
    used = {clip.name for clip in prepared.clips if clip.split != "test"}
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    with (recordings / "train_corpus" / "ATTRIBUTION.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if f"train_corpus/{row['file']}" not in used:
                continue
            place, _, title = row["source"].removesuffix(" and neighbours").rpartition(":")
            found = {
                "source": place or title,
                "title": title,
                **{key: row[key] for key in ("author", "licence", "url", "source_group")},
            }
            rows[tuple(found.values())] = found
    banks = {clip.source for clip in prepared.clips if clip.split == "train"} & set(RENDERED)
    return [*(rows[key] for key in sorted(rows)), *(RENDERED[bank] for bank in sorted(banks))]


def notice(attribution: Sequence[Mapping[str, str]]) -> str:
    """The NOTICE of the bundle: who recorded what it learned from."""
    credits: dict[tuple[str, str], int] = {}
    for row in attribution:
        key = (row["author"] or "author not named", row["licence"])
        credits[key] = credits.get(key, 0) + 1
    lines = [
        "clapsep-mini was trained on the recordings listed in ATTRIBUTION.csv, none of which is part of it.",
        "Its text tower was distilled from sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0); its words",
        "and parts of words are from that model's vocabulary.",
        "Authors, licences and the number of recordings:",
        "",
        *(f"  {author} ({licence}): {count}" for (author, licence), count in sorted(credits.items())),
    ]
    return "\n".join(lines) + "\n"


def write_measurement(folder: Path, summary: Mapping[str, Any]) -> None:
    """Put the table of `evaluate` into the card. The digest does not cover the card, so it stays."""
    path = folder / bundle.CARD_FILE
    measured = {
        "si_sdr_improvement_db": summary,
        "mixtures": "clapsep/training/test_mixtures.csv: 0 dB, 5 s, test split",
    }
    content = {**json.loads(path.read_text()), "measurement": measured}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ATTRIBUTION_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
