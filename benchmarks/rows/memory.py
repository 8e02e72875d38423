"""Soon."""
from benchmarks.bench import Bench
from benchmarks.report import Row
def run(bench: Bench) -> Row:
    return Row("x","x")
