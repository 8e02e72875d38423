"""`python -m tests.service.noting_worker`: a worker that notes digests of the credentials that its jobs were given.

It is the real worker with a real engine; the extraction's kind writes a line more into `$NOTES`, and fails the first
attempts of jobs whose first input is `again`, as a source out of reach would.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bathyscope.errors import InternalError
from bathyscope_backplane.settings import load_settings
from bathyscope_workers.jobs import KINDS, JobWork
from bathyscope_workers.jobs.extraction import ExtractionJob
from bathyscope_workers.run import serve


class NotingJob(ExtractionJob):
    async def commands(self, work: JobWork) -> list[Any]:
        given = {
            name: hashlib.sha256(value.encode()).hexdigest()
            for name, value in asdict(work.credentials).items()
            if value is not None
        }
        line = json.dumps({"job": work.lease.job_id, "attempt": work.lease.attempt, "given": given})
        with await asyncio.to_thread(Path(os.environ["NOTES"]).open, "a") as notes:
            notes.write(line + "\n")
        if (work.payload.get("rows") or [""])[0] == "again":
            raise InternalError(f"The source does not answer to {work.credentials}.", retry=True)
        return await super().commands(work)


KINDS["extraction"] = NotingJob()

if __name__ == "__main__":
    serve(load_settings())
