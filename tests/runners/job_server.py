"""A stand-in for `java -jar beam-runners-flink-...-job-server-....jar`, by the same command line.

It is Beam's own job service in Python, of which Flink's is another. Jobs really run, with the workers that
they name; what comes is written to the folder in `JOB_SERVER_RECORDS`. A file `fail` there makes every job
fail with its text.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from apache_beam.portability.api import beam_job_api_pb2
from apache_beam.runners.portability.local_job_service import BeamJob, LocalJobServicer

RECORDS_VARIABLE = "JOB_SERVER_RECORDS"
COMMAND_FILE = "command.json"
REQUEST_FILE = "prepare.pb"
FAIL_FILE = "fail"
# A few of those that Flink's describes, two of which the command declares as well.
_DESCRIBED = (
    ("number_of_execution_retries", beam_job_api_pb2.PipelineOptionType.INTEGER, "-1"),
    ("parallelism", beam_job_api_pb2.PipelineOptionType.INTEGER, "-1"),
    ("object_reuse", beam_job_api_pb2.PipelineOptionType.BOOLEAN, "false"),
)


class Job(BeamJob):
    """Runs, or fails as it is told."""

    def _invoke_runner(self):
        fail = _records() / FAIL_FILE
        if fail.exists():
            self.set_state(beam_job_api_pb2.JobState.RUNNING)
            raise RuntimeError(fail.read_text())
        return super()._invoke_runner()


class JobServer(LocalJobServicer):
    """Writes down what it is asked to prepare."""

    def Prepare(self, request, context=None, timeout=None):  # noqa: N802
        (_records() / REQUEST_FILE).write_bytes(request.SerializeToString())
        return super().Prepare(request, context, timeout)

    def DescribePipelineOptions(self, request, context=None, timeout=None):  # noqa: N802
        described = beam_job_api_pb2.DescribePipelineOptionsResponse()
        for name, kind, default in _DESCRIBED:
            described.options.add(name=name, type=kind, default_value=default, description=name)
        return described


def _records() -> Path:
    return Path(os.environ[RECORDS_VARIABLE])


def main() -> None:
    facts = {"arguments": sys.argv[1:], "pid": os.getpid()}
    (_records() / COMMAND_FILE).write_text(json.dumps(facts))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--job-port", type=int, required=True)
    given, _ = parser.parse_known_args()
    server = JobServer(beam_job_type=Job)
    server.start_grpc_server(given.job_port)
    signal.pause()


if __name__ == "__main__":
    main()
