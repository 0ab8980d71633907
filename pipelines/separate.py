"""`python -m pipelines.separate --manifest M --output O`: separate every row of a manifest.

Exit codes: 0 done, 1 a run that failed or whose rows do not add up, 2 nothing was started.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from clapsep import bundle as bundles
from pipelines import options, report, runs
from pipelines.graph import SeparateManifest
from pipelines.manifest import Manifest, ManifestError, open_manifest
from pipelines.options import Plan, UsageError
from pipelines.progress import PROGRESS, ProgressDisplay
from pipelines.storage import StorageError
from pipelines.tables import count_committed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Beam's own start-up chatter would bury ours.
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    try:
        given, pipeline_options = options.parse(sys.argv[1:] if arguments is None else arguments)
        if given.report:
            report.require_matplotlib()
        manifest = open_manifest(given.manifest)
        bundle = bundles.verify(given.model)
        earlier = runs.read_run(given.output)
        plan = Plan(
            output=given.output,
            shards=given.num_shards or (earlier.shards if earlier else options.default_shards(manifest.rows)),
            settings=options.settings_of(given),
            bundle=given.model,
            bundle_digest=bundle.digest,
            device=given.device,
            batch_windows=given.batch_windows,
            carried=manifest.carried,
        )
        options.check_hop(plan.settings, bundle.config.window_seconds)
        if earlier:
            earlier.check(plan)
            plan = replace(plan, carried=tuple(sorted({*plan.carried, *earlier.carried})))
        before = count_committed(plan.output)
        runs.write_run(plan, manifest, bundle.card, earlier)
    except (UsageError, ManifestError, bundles.BundleError, runs.RunError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = bundle.card.get("name", "unnamed")
    source = "--model was not given: using the embedded bundle" if given.model is None else "model"
    print(f"{source} {name} ({bundle.digest[:12]})")
    ignored = f", {manifest.ignored} other files ignored" if manifest.ignored else ""
    shards = "1 shard" if plan.shards == 1 else f"{plan.shards} shards"
    print(f"manifest {manifest.uri}: {manifest.rows} rows{ignored}; {shards}; output {plan.output}")
    try:
        run_pipeline(manifest, plan, pipeline_options)
    except Exception as error:
        print(
            f"error: {' '.join(str(error).split()) or type(error).__name__}\n"
            "The run stopped; what it has committed stays, and the same command goes on from there.",
            file=sys.stderr,
        )
        return 1
    return conclude(plan, manifest, bundle, before, earlier, with_report=given.report)


def run_pipeline(manifest: Manifest, plan: Plan, pipeline_options: PipelineOptions) -> None:
    """Build the graph and run it to its end, on whatever runner the options name."""
    PROGRESS.start(manifest.rows)
    with ProgressDisplay():
        pipeline = beam.Pipeline(options=pipeline_options)
        pipeline | SeparateManifest(manifest, plan)
        pipeline.run().wait_until_finish()


def conclude(
    plan: Plan,
    manifest: Manifest,
    bundle: bundles.VerifiedBundle,
    before: tuple[int, int],
    earlier: runs.EarlierRun | None,
    with_report: bool,
) -> int:
    """Read the committed tables back, check that every row is in one of them, and say so."""
    metrics, errors = count_committed(plan.output)
    counts = {"rows": manifest.rows, "metrics": metrics, "errors": errors}
    runs.write_run(plan, manifest, bundle.card, earlier, counts)
    new = metrics + errors - sum(before)
    print(f"{metrics - before[0]} rows separated, {errors - before[1]} errors in this run")
    if new == 0:
        print("nothing to do: every row was committed by an earlier run")
    surplus = metrics + errors - manifest.rows
    # Rows that were edited or taken out since stay in the tables. Without another manifest there are none.
    explained = surplus > 0 and earlier is not None and {*earlier.manifests} - {manifest.digest}
    left = f"rows in {manifest.rows}" + (f" + {surplus} of earlier manifests" if explained else "")
    if surplus and not explained:
        print(f"error: {left} is not metrics {metrics} + errors {errors}; run again", file=sys.stderr)
        return 1
    print(f"{left} = metrics {metrics} + errors {errors}")
    if with_report:
        report.print_report(plan.output)
    elif errors:
        report.print_errors(plan.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
