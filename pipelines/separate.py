"""`python -m pipelines.separate --manifest M --output O`: separate every row of a manifest.

`--status OUTPUT` and `--clean OUTPUT` look after an output instead.

Exit codes: 0 done, 1 a run that failed or whose rows do not add up, 2 nothing was started.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from clapsep import bundle as bundles
from clapsep.manifest import Manifest, ManifestError, open_manifest
from clapsep.retry import redact
from clapsep.storage import StorageError
from pipelines import options, report, runners, runs
from pipelines.clean import clean
from pipelines.dry_run import dry_run
from pipelines.graph import SeparateManifest
from pipelines.options import Plan, UsageError
from pipelines.progress import PROGRESS, ProgressDisplay
from pipelines.status import Totals, failure_lines, print_status, read_totals
from pipelines.watch import CommittedProgress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Their chatter, at the start and at every file, would bury ours.
    for name in ("apache_beam", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What it logs as a stack of calls it raises, too.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        given, pipeline_options = options.parse(sys.argv[1:] if arguments is None else arguments)
        if given.status is not None:
            print_status(given.status)
            return 0
        if given.clean is not None:
            clean(given.clean, dry_run=given.dry_run)
            return 0
        if given.report:
            report.require_matplotlib()
        hints = {} if given.dry_run else runners.prepare(pipeline_options, given)
        manifest = open_manifest(given.manifest)
        bundle = bundles.verify(given.model)
        plan, earlier = make_plan(given, manifest, bundle)
        if given.dry_run:
            return dry_run(manifest, plan)
        before = read_totals(plan.output)
        if not runs.write_run(plan, manifest, bundle.card, earlier):
            # Another first run on this output, started at the same moment, was there before.
            plan, earlier = make_plan(given, manifest, bundle)
            runs.write_run(plan, manifest, bundle.card, earlier)
    except (UsageError, ManifestError, bundles.BundleError, runs.RunError, StorageError) as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    name = bundle.card.get("name", "unnamed")
    source = "--model was not given: using the embedded bundle" if given.model is None else "model"
    print(f"{source} {name} ({bundle.digest[:12]})")
    ignored = f", {manifest.ignored} other files ignored" if manifest.ignored else ""
    shards = "1 shard" if plan.shards == 1 else f"{plan.shards} shards"
    run = f"manifest {manifest.uri}: {manifest.rows} rows{ignored}; {shards}; output {plan.output}"
    print(redact(run))
    try:
        if not run_pipeline(manifest, plan, pipeline_options, hints):
            print("a template of this run was written; nothing was run")
            return 0
    except Exception as error:
        print(
            f"error: {redact(runners.cause_of(error))}\n"
            "The run stopped; what it has committed stays, and the same command goes on from there.",
            file=sys.stderr,
        )
        return 1
    try:
        return conclude(plan, manifest, bundle, before, with_report=given.report)
    except StorageError as error:
        print(f"error: {error}\nThe rows are done, but could not be counted; run again.", file=sys.stderr)
        return 1


def make_plan(
    given: argparse.Namespace, manifest: Manifest, bundle: bundles.VerifiedBundle
) -> tuple[Plan, runs.EarlierRun | None]:
    """The run that the command line asks for, and the one that the output holds; nothing is written.

    Raises UsageError, or RunError where the output does not allow it.
    """
    earlier = runs.require_run(given.output) if given.retry_errors else runs.read_run(given.output)
    plan = Plan(
        output=given.output,
        shards=given.num_shards or (earlier.shards if earlier else options.default_shards(manifest.rows)),
        settings=options.settings_of(given),
        bundle=given.model,
        bundle_digest=bundle.digest,
        device=given.device,
        batch_windows=given.batch_windows,
        memory_gb=given.memory_gb,
        carried=manifest.carried,
        retry_errors=given.retry_errors,
        model_sharing=given.model_sharing,
    )
    options.check_hop(plan.settings, bundle.config.window_seconds)
    if earlier:
        earlier.check(plan, given.allow_other_settings)
        plan = replace(plan, carried=tuple(sorted({*plan.carried, *earlier.carried})))
    return plan, earlier


def run_pipeline(
    manifest: Manifest,
    plan: Plan,
    pipeline_options: PipelineOptions,
    hints: Mapping[str, str] | None = None,
) -> bool:
    """Build the graph and run it to its end, on whatever runner the options name; see SeparateManifest.

    False where only a template was written, from which Dataflow starts runs later.
    """
    PROGRESS.start(manifest.rows)
    in_process = runners.is_in_process(pipeline_options)
    with nullcontext() if in_process else CommittedProgress(plan.output), ProgressDisplay():
        pipeline = beam.Pipeline(options=pipeline_options)
        pipeline | SeparateManifest(manifest, plan, hints)
        result = pipeline.run()
        if not getattr(result, "has_job", True):
            return False
        if (url := runners.job_url(pipeline_options, result)) is not None:
            print(f"submitted: {url}", flush=True)
        result.wait_until_finish()
    return True


def conclude(
    plan: Plan,
    manifest: Manifest,
    bundle: bundles.VerifiedBundle,
    before: Totals,
    with_report: bool,
) -> int:
    """Read the committed tables back, check that every row is in one of them, and say so."""
    total = read_totals(plan.output)
    counts = {"rows": manifest.rows, "metrics": total.metrics, "errors": total.errors}
    # Read again: a run beside this one may have added its manifest.
    earlier = runs.read_run(plan.output)
    runs.write_run(plan, manifest, bundle.card, earlier, counts)
    separated = total.metrics - before.metrics
    if plan.retry_errors:
        print(f"{separated} of {before.errors} failed rows separated, {total.errors} remain")
    else:
        print(f"{separated} rows separated, {total.errors - before.errors} errors in this run")
        unchanged = (total.metrics, total.errors) == (before.metrics, before.errors)
        if unchanged and total.metrics + total.errors >= manifest.rows:
            print("nothing to do: every row was committed by an earlier run")
    sums = f"metrics {total.metrics} + errors {total.errors}"
    surplus = total.metrics + total.errors - manifest.rows
    # Rows that were edited or taken out since stay in the tables. Without another manifest there are none.
    explained = surplus > 0 and earlier is not None and len(earlier.manifests) > 1
    left = f"rows in {manifest.rows}" + (f" + {surplus} of earlier manifests" if explained else "")
    if surplus < 0 and plan.retry_errors:
        print(f"{left} = {sums} + pending {-surplus}; a run without --retry-errors does these")
    elif surplus and not explained:
        print(f"error: {left} is not {sums}; run again", file=sys.stderr)
        return 1
    else:
        print(f"{left} = {sums}")
    if with_report:
        report.print_report(plan.output)
    elif total.failures:
        print("\n".join(failure_lines(total.failures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
