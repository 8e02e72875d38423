"""`python -m bathyscope_service.datasets.parquet_child FILE`: a Parquet file as JSON lines, in a process of its own.

A small file may ask for any amount of memory: its pages are compressed, its dictionaries repeat, and its sizes are what
its author says. So it is read where memory and time are bounded and nothing else goes down.
"""

from __future__ import annotations

import os
import resource
import sys

MEMORY_BYTES = 1536 * 2**20
"""Private memory of the process; pyarrow alone takes some 200 MB."""

CPU_SECONDS = 120
_BATCH_ROWS = 32


def main(path: str) -> int:
    """Write one line a row: the row as a JSON object. Status 3: not Parquet, 4: out of memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    import orjson
    import pyarrow as pa
    from pyarrow import parquet

    pa.set_cpu_count(1)
    try:
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    try:
                        line = orjson.dumps({name: value for name, value in row.items() if value is not None})
                    except (TypeError, ValueError):
                        line = b"null"  # bytes, or what else has no form in JSON
                    sys.stdout.buffer.write(line + b"\n")
    except BrokenPipeError:
        os._exit(0)
    except (MemoryError, pa.ArrowMemoryError):
        return 4
    except (pa.ArrowException, OSError, ValueError):
        return 3
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
