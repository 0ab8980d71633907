"""`python -m clapsep.training COMMAND`.

`fit` fine-tunes on a manifest, `pack` writes what it trained. `prepare`, `pretrain`, `train`, `export` and
`evaluate` make the embedded default (`make train-mini`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_WORK = Path.home() / ".cache" / "clapsep" / "training"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(prog="python -m clapsep.training", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=DEFAULT_WORK, help="folder for the corpus and checkpoints"
    )
    parser.add_argument("--seed", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser("prepare", help="decode the corpus and render the sound banks, once")
    prepare.add_argument("--corpus", type=Path, required=True, help="holds train_corpus/ and sample_corpus/")
    prepare.add_argument(
        "--train-bank", type=Path, action="append", default=[], help="sound bank to train on"
    )
    prepare.add_argument("--test-bank", type=Path, action="append", default=[], help="sound bank to test on")
    prepare.add_argument("--flite", type=Path, help="the speech synthesiser; its voices join training")
    prepare.add_argument(
        "--packages", type=Path, help="folder of unpacked packages, whose recordings join validation"
    )

    sources = commands.add_parser("sources", help="write the committed table of recordings anew")
    sources.add_argument("--corpus", type=Path, required=True)

    pretrain = commands.add_parser("pretrain", help="contrastive pre-training of the two towers")
    pretrain.add_argument("--manifest", help="captioned recordings, in place of the default's corpus")
    pretrain.add_argument("--out", type=Path, help="folder of the bundle, with --manifest")
    pretrain.add_argument("--size", choices=("mini", "base"), default="mini", help="with --manifest")
    pretrain.add_argument("--device", default="cpu", help="with --manifest; cpu (default), cuda, cuda:1, ...")
    pretrain.add_argument("--steps", type=int, default=700)
    pretrain.add_argument("--batch", type=int, default=24, help="clips per process and step")

    train = commands.add_parser("train", help="train the default's separator; resumes from the work folder")
    train.add_argument("--steps", type=int, default=5800)
    train.add_argument("--mask-steps", type=int, default=400, help="steps that fade out the mask loss")
    train.add_argument("--batch", type=int, default=10, help="mixtures per process and step")

    for command in (pretrain, train):
        command.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
        command.add_argument("--learning-rate", type=float, default=1e-3)
        command.add_argument("--start", help="bundle of an earlier default to begin with")

    pretrain.add_argument("--text-steps", type=int, default=6000, help="steps of the text tower before")
    pretrain.add_argument("--phrases", type=int, default=30_000, help="that the text tower is taught")
    pretrain.add_argument("--words", type=int, help="most words of the teacher; all without")
    train.add_argument("--all-classes", action="store_true", help="also those that are not claimed")

    export = commands.add_parser("export", help="write the trained weights as a bundle")
    export.add_argument("--corpus", type=Path, required=True, help="for the attribution")
    export.add_argument("--bundle", type=Path, required=True)

    listing = commands.add_parser("list", help="draw the committed list of test mixtures anew")
    listing.add_argument("--per-class", type=int, default=36)
    listing.add_argument("--out", type=Path, help="default: in place of the committed one")

    evaluate = commands.add_parser("evaluate", help="measure a bundle on the committed test mixtures")
    evaluate.add_argument("--bundle", type=Path, help="default: the embedded one")
    evaluate.add_argument("--records", type=Path, help="write one line per mixture here (CSV)")
    mixtures = evaluate.add_mutually_exclusive_group()
    mixtures.add_argument("--list", type=Path, help="what `list` wrote; default: the committed one")
    mixtures.add_argument("--validation", action="store_true", help="draw validation mixtures instead")
    evaluate.add_argument("--extremes", type=Path, metavar="FOLDER", help="write the worst and the best here")
    evaluate.add_argument("--card", action="store_true", help="write the table into the bundle's card")

    _add_fit(commands.add_parser("fit", help="fine-tune on a manifest; resumes what is in --out"))

    pack = commands.add_parser("pack", help="write the weights of a fit")
    pack.add_argument("run", type=Path, help="its --out")
    pack.add_argument("--checkpoint", choices=("best", "last"), default="best")
    pack.add_argument("--bundle", metavar="FOLDER", help="write a bundle here, local or any URI")
    pack.add_argument("--published", type=Path, metavar="FOLDER", help="write clap.pt and clapsep.ckpt here")

    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except _user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _add_fit(fit: argparse.ArgumentParser) -> None:
    fit.add_argument("--manifest", required=True, help="clean recordings (target, positive_text) to mix")
    fit.add_argument("--validation", required=True, help="mixtures, or clean recordings to mix")
    fit.add_argument("--init", required=True, help="bundle, or LAION-CLAP's checkpoint")
    fit.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curves and the bundle")
    fit.add_argument("--tokenizer", help="RoBERTa's, where --init is LAION-CLAP's checkpoint")
    fit.add_argument(
        "--keep-separator",
        action="store_true",
        help="go on from the bundle's encoder and decoder; default: its towers, and a new decoder",
    )
    fit.add_argument("--epochs", type=int, default=150, help="validations until the end")
    fit.add_argument("--epoch-steps", type=int, help="steps between validations; default: one pass")
    fit.add_argument("--batch", type=int, default=16, help="mixtures per device and step")
    fit.add_argument("--learning-rate", type=float, default=1e-4)
    fit.add_argument("--rank", type=int, default=16, help="of LoRA")
    fit.add_argument("--snr", type=float, nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 0.0), help="dB")
    fit.add_argument("--ema", type=float, metavar="DECAY", help="average the weights, e.g. 0.999")
    fit.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    fit.add_argument("--devices", type=int, default=1, help="processes, one for each device")
    fit.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")
    fit.add_argument("--workers", type=int, default=0, help="processes per device that read recordings ahead")


def _user_errors() -> tuple[type[Exception], ...]:
    from clapsep.audio import AudioError
    from clapsep.bundle import BundleError
    from clapsep.convert import ConvertError
    from clapsep.device import DeviceError
    from clapsep.manifest import ManifestError
    from clapsep.storage import StorageError
    from clapsep.training.finetune import TrainingError
    from clapsep.training.recordings import TrainingDataError

    return (
        AudioError,
        BundleError,
        ConvertError,
        DeviceError,
        ManifestError,
        StorageError,
        TrainingDataError,
        TrainingError,
    )


def _prepare(options: argparse.Namespace) -> None:
    from clapsep.training import corpus

    prepared = corpus.prepare(
        options.corpus,
        options.work / "corpus",
        options.train_bank,
        options.test_bank,
        options.flite,
        options.packages,
    )
    for split in ("train", "validation", "test"):
        for name, clips in prepared.of(split).items():
            minutes = sum(clip.frames for clip in clips) / corpus.SAMPLE_RATE / 60
            groups = len({clip.group for clip in clips})
            print(f"{split:<11}{name:<20}{len(clips):>5} clips {minutes:>6.1f} min {groups:>4} source groups")


def _sources(options: argparse.Namespace) -> None:
    from clapsep.training import sources

    print(f"{sources.write(options.corpus)} recordings in {sources.TABLE}")


def _pretrain(options: argparse.Namespace) -> None:
    if options.manifest is not None or options.out is not None:
        _pretrain_on_manifest(options)
        return
    from clapsep import bundle
    from clapsep.config import MINI
    from clapsep.training import corpus, pretrain, vocabulary
    from clapsep.training.text_tower import Lesson

    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / pretrain.TOWERS).exists():
        unseen = {text for texts in vocabulary.UNSEEN.values() for text in texts}
        lesson = Lesson.prepare(
            vocabulary.all_wordings(), MINI.joint, options.phrases, options.seed, options.words, unseen
        )
        pretrain.save_towers(
            *pretrain.pretrain_text(MINI, lesson, options.text_steps, options.seed), options.work
        )
    clap, tokenizer = pretrain.load_towers(MINI, options.work)
    if options.start:
        pretrain.begin_audio(clap, tokenizer, bundle.load(options.start))
    pretrain.pretrain(
        corpus.load(options.work / "corpus"),
        clap,
        tokenizer,
        tuple(vocabulary.BY_NAME),
        options.work,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        processes=options.processes,
        seed=options.seed,
    )


def _pretrain_on_manifest(options: argparse.Namespace) -> None:
    from clapsep.training import contrastive
    from clapsep.training.finetune import TrainingError

    if options.manifest is None or options.out is None:
        raise TrainingError("pretrain: --manifest and --out go together; give both or neither")
    digest = contrastive.pretrain(
        options.manifest,
        options.out,
        size=options.size,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        processes=options.processes,
        device=options.device,
        seed=options.seed,
    )
    if digest:
        print(f"bundle {digest} in {options.out}")


def _fit(options: argparse.Namespace) -> None:
    from clapsep.training import finetune

    digest = finetune.fit(
        options.manifest,
        options.validation,
        options.init,
        options.out,
        tokenizer=options.tokenizer,
        keep_separator=options.keep_separator,
        epochs=options.epochs,
        epoch_steps=options.epoch_steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        rank=options.rank,
        snr_db=tuple(options.snr),
        ema=options.ema,
        seed=options.seed,
        device=options.device,
        devices=options.devices,
        precision=options.precision,
        workers=options.workers,
    )
    if digest:
        print(f"bundle {digest} in {options.out / finetune.BUNDLE}")


def _pack(options: argparse.Namespace) -> None:
    from clapsep.training import finetune

    checkpoint = options.run / f"{options.checkpoint}.ckpt"
    digest = finetune.pack(options.run, checkpoint, options.bundle, options.published)
    if digest:
        print(f"bundle {digest} in {options.bundle}")


def _train(options: argparse.Namespace) -> None:
    from clapsep import bundle
    from clapsep.config import MINI
    from clapsep.training import corpus, default, pretrain, vocabulary

    clap, tokenizer = pretrain.load_towers(MINI, options.work)
    default.train(
        corpus.load(options.work / "corpus"),
        clap,
        tokenizer,
        tuple(vocabulary.BY_NAME) if options.all_classes else vocabulary.CLAIMED,
        options.work,
        steps=options.steps,
        mask_steps=options.mask_steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        processes=options.processes,
        seed=options.seed,
        start=bundle.load(options.start) if options.start else None,
    )


def _export(options: argparse.Namespace) -> None:
    from clapsep.training import export

    print(f"bundle {export.export(options.work, options.corpus, options.bundle)} in {options.bundle}")


def _list(options: argparse.Namespace) -> None:
    from clapsep.training import corpus, evaluate, vocabulary

    prepared = corpus.load(options.work / "corpus")
    rows = evaluate.draw(prepared, vocabulary.CLAIMED, options.per_class, options.seed)
    out = options.out or evaluate.TEST_LIST
    evaluate.write_test_list(rows, out)
    print(f"{len(rows)} test mixtures in {out}")


def _evaluate(options: argparse.Namespace) -> None:
    import csv

    from clapsep import bundle
    from clapsep.training import corpus, evaluate, export, vocabulary

    loaded = bundle.load(str(options.bundle) if options.bundle else None)
    prepared = corpus.load(options.work / "corpus")
    if options.validation:
        rows = evaluate.draw(prepared, tuple(vocabulary.BY_NAME), 12, options.seed, "validation")
    else:
        rows = evaluate.read_test_list(options.list or evaluate.TEST_LIST)
    records = evaluate.evaluate(loaded, prepared, rows, "validation" if options.validation else "test")
    summary = evaluate.summarise(records) | {"free_wording": evaluate.free_wording(loaded)}
    print(evaluate.table(summary))
    if options.records:
        with options.records.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    if options.extremes:
        evaluate.write_extremes(records, rows, prepared, options.extremes)
    if options.card:
        export.write_measurement(options.bundle, summary)


COMMANDS = {
    "prepare": _prepare,
    "sources": _sources,
    "pretrain": _pretrain,
    "train": _train,
    "fit": _fit,
    "pack": _pack,
    "export": _export,
    "list": _list,
    "evaluate": _evaluate,
}

if __name__ == "__main__":
    main()
