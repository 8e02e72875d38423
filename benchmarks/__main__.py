"""`python -m benchmarks`: see README.md."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import machine, page, report
from benchmarks.bench import Bench
from benchmarks.measure import ForeignLoad
from benchmarks.report import Goal, Row
from benchmarks.rows import (
    adapters,
    again,
    all_tokens,
    asking,
    clients,
    memory,
    mixed,
    noop_jobs,
    one_text,
    payload,
    peers,
    prefix,
    probes,
    quantized,
    shards,
)
from benchmarks.stack import running

ROWS: dict[str, Callable[[Bench], Row]] = {
    "mixed-float32": mixed.float32,
    "mixed-bfloat16": mixed.bfloat16,
    "peers": peers.decoders,
    "encoder": peers.encoders,
    "one-text": one_text.run,
    "ask": asking.run,
    "all-tokens": all_tokens.run,
    "memory": memory.run,
    "adapters": adapters.traffic,
    "clients": clients.run,
    "attach": adapters.attach,
    "probes": probes.logistic,
    "prefix": prefix.run,
    "again": again.run,
    "quantized": quantized.run,
    "payload": payload.run,
    "noop-jobs": noop_jobs.run,
    "shards": shards.two_workers,
    "small-beside-large": shards.small_beside_large,
}
_BFLOAT16_ONLY = {"mixed-bfloat16"}


def main() -> int:
    """Run the rows; 0 also when a goal is missed, since a slow machine is no broken build."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stack ends with the run
    # The terminal's own width where there is one; in a log, wide enough not to fold every cell.
    console = Console(width=None if sys.stdout.isatty() else 150)
    wanted = options.only or [name for name in ROWS if name not in _BFLOAT16_ONLY or machine.has_fast_bfloat16()]
    about = machine.describe()
    rows: list[Row] = []
    html = options.json.with_suffix(".html")
    with running() as stack, stack.client() as client:
        bench = Bench(stack, client, options.full, console, options.patience)
        bench.say("the stack is up; loading the model")
        bench.warm("float32")
        bench.threads = stack.threads()
        about["threads"] = bench.threads
        for name in wanted:
            bench.say(f"{name} …")
            started = time.monotonic()
            with ForeignLoad(bench.own()) as load:
                row = _run(name, bench)
            row.foreign_cores, row.seconds = load.cores, time.monotonic() - started
            rows.append(row)
            # After each row: what was measured is kept when the run is cut short.
            report.write(options.json, rows, about, {"full": options.full, "rows": wanted})
            page.write(html, rows, about)
    report.show(rows, about, console)
    if not machine.has_fast_bfloat16() and "mixed-bfloat16" not in wanted:
        console.print("No bfloat16 row: this processor has neither AMX nor AVX-512 BF16.")
    console.print(f"written to {options.json} and {html.name} beside it")
    return 0


def _run(name: str, bench: Bench) -> Row:
    """A row that fails is shown as failed, and the others are run."""
    try:
        return ROWS[name](bench)
    except Exception as error:
        bench.console.print_exception()
        reason = f"{type(error).__name__}: {error}"[:300]
        return Row(name=name, title="failed", goals=[Goal("it runs", reason, met=False)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Ratios, measured alternately in one run."
    )
    parser.add_argument("--only", action="append", choices=list(ROWS), help="this row; may be given again")
    parser.add_argument("--full", action="store_true", help="the large sizes: over an hour on two cores")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds to wait for a quiet machine before a measurement (10)"
    )
    default = Path(__file__).parent / "results" / "latest.json"
    parser.add_argument("--json", type=Path, default=default, help="where the JSON goes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
