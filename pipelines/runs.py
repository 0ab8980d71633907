"""`run.json`: what made an output, so that a later run on it does the same or is refused."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clapsep import __version__, storage
from clapsep.manifest import Manifest
from clapsep.retry import redact
from pipelines.options import Plan

RUN_FILE = "run.json"
FORMAT = 2
_LIBRARIES = ("apache-beam", "numpy", "pyarrow", "soundfile", "soxr", "torch")


class RunError(ValueError):
    """An output that this run may not add to; one line that names the difference and the fix."""


@dataclass(frozen=True)
class EarlierRun:
    """What `run.json` of an output says."""

    output: str
    facts: Mapping[str, Any]

    @property
    def shards(self) -> int:
        """The number of shards, which holds for every run on this output."""
        return self.facts["shards"]

    @property
    def carried(self) -> tuple[str, ...]:
        """Manifest columns that are in the metrics table."""
        return tuple(self.facts["carried"])

    @property
    def manifests(self) -> tuple[str, ...]:
        """Digests of all manifests that were run on this output."""
        return tuple(self.facts["manifests"])

    def check(self, plan: Plan, allow_other_settings: bool = False) -> None:
        """Raises RunError where `plan` would give other results, naming every difference.

        Another number of shards cannot be allowed: rows would be sought in the wrong places.
        """
        then, now = {"num_shards": self.shards}, {"num_shards": plan.shards}
        if not allow_other_settings:
            then |= {**self.facts["settings"], "model": self.facts["bundle"]["digest"]}
            now |= {**plan.settings.to_dict(), "model": plan.bundle_digest}
        differences = [
            f"{name} was {_short(then.get(name))} and is {_short(now.get(name))}"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
        if differences:
            allow = (
                "" if plan.shards != self.shards else ", --allow-other-settings for the rows still to come"
            )
            raise RunError(
                f"{self.output} holds a run with other settings: {'; '.join(differences)}; "
                f"use those again{allow}, or another --output"
            )


def read_run(output: str) -> EarlierRun | None:
    """The run that an output holds; None where there is none.

    Raises RunError for a `run.json` that is not ours, StorageError when it cannot be read.
    """
    uri = storage.join(output, RUN_FILE)
    if not storage.exists(uri):
        return None
    try:
        facts = json.loads(storage.read_bytes(uri))
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}")
        return EarlierRun(output, facts)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{uri}: not written by this version ({error!r}); use another --output") from error


def require_run(output: str) -> EarlierRun:
    """The run that an output holds. Raises RunError where there is none, and what `read_run` raises."""
    run = read_run(output)
    if run is None:
        raise RunError(f"{output}: holds no {RUN_FILE}; give the --output of a run")
    return run


def require_shared(output: str) -> None:
    """Raises RunError where a worker finds another folder under `output` than the command has written to."""
    if not storage.exists(storage.join(output, RUN_FILE)):
        raise RunError(
            f"{output}: worker {platform.node()} sees no {RUN_FILE} there, so it is another folder than the "
            "command's; give a mount that all workers have, or a bucket"
        )


def write_run(
    plan: Plan,
    manifest: Manifest,
    card: Mapping[str, Any],
    earlier: EarlierRun | None,
    counts: Mapping[str, int] | None = None,
) -> bool:
    """Write `run.json`; without `counts` it says that the run has not ended. Raises StorageError.

    Returns False, with nothing written, where `earlier` is None and another run has written one meanwhile.
    """
    bundle = plan.bundle and redact(plan.bundle)
    recipe = {
        "settings_digest": plan.settings_digest,
        "settings": plan.settings.to_dict(),
        "bundle": {"uri": bundle, "name": card.get("name"), "digest": plan.bundle_digest},
    }
    facts = {
        "format": FORMAT,
        **recipe,
        "earlier_settings": _earlier_recipes(earlier, plan.settings_digest),
        "shards": plan.shards,
        "carried": list(plan.carried),
        "manifest": {"uri": redact(manifest.uri), "digest": manifest.digest, "rows": manifest.rows},
        "manifests": sorted({manifest.digest, *(earlier.manifests if earlier else ())}),
        "counts": counts,
        "versions": {
            "clapsep": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    }
    uri, data = storage.join(plan.output, RUN_FILE), (json.dumps(facts, indent=2) + "\n").encode()
    if earlier is None:
        return storage.create_bytes(uri, data)
    storage.write_bytes(uri, data)
    return True


def _earlier_recipes(earlier: EarlierRun | None, digest: str) -> list[dict[str, Any]]:
    """Settings and bundles that rows of the output may have been made with, besides those of `digest`."""
    if earlier is None:
        return []
    latest = {name: earlier.facts[name] for name in ("settings_digest", "settings", "bundle")}
    return [
        recipe
        for recipe in (latest, *earlier.facts["earlier_settings"])
        if recipe["settings_digest"] != digest
    ]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)
