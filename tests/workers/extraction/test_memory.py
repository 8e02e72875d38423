"""A large result is written to its file, not held in memory."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bathyscope_workers.models.spec import ModelSpec

# In a process of its own, so that nothing else moves its memory.
MEASURE = """
import json, sys, threading, time
from bathyscope_workers.extraction.batch import run_batch
from bathyscope_workers.extraction.extraction import Extraction
from bathyscope_workers.extraction.spec import ExtractionSpec
from bathyscope_workers.extraction.template import ChatRenderer
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.load import load_resident
from bathyscope_workers.models.spec import ModelSpec
import torch

torch.set_num_threads(1)  # the model's operations are too small to share

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

resident = load_resident(ModelSpec("tiny/wide", sys.argv[1]), Device.pick(force_cpu=True))
def extraction(count, folder):
    # No two are the same: equal ones would be computed once.
    inputs = [{"token_ids": [5 + index % 110, 5 + index // 110, 9][: 2 + index % 2]} for index in range(count)]
    return Extraction(ExtractionSpec.from_wire({"layers": "all"}), resident, inputs=inputs, inputs_path=None,
                      scratch=folder, renderer=ChatRenderer())
def run(job):
    peak = 0
    while not job.tokenise_step():
        pass
    while job.queues[0]:
        run_batch([(job, job.queues[0].take(512))], budget=512)
        peak = max(peak, anonymous())
    return peak
run(extraction(300, sys.argv[2]))  # what a first run allocates once
before = anonymous()
job = extraction(10_000, sys.argv[3])
peak = run(job)
print(json.dumps([peak - before, job.finish().bytes]))
"""


def test_ten_thousand_texts_of_thirty_one_layers(tiny_model: Callable[..., ModelSpec], tmp_path: Path) -> None:
    """SmolLM2's depth and width with next to nothing inside, for speed."""
    spec = tiny_model(
        "Llama",
        name="tiny/wide",
        vocab_size=120,
        hidden_size=576,
        intermediate_size=8,
        num_hidden_layers=30,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    warm, result = tmp_path / "warm", tmp_path / "result"
    warm.mkdir()
    result.mkdir()
    command = [sys.executable, "-c", MEASURE, spec.source, str(warm), str(result)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    grown, size = (int(one) for one in output.strip().splitlines()[-1].strip("[]").split(","))
    assert size > 10_000 * 31 * 576 * 4
    assert grown < size / 10
    print(f"RssAnon grew by {grown / 2**20:.0f} MiB for a result of {size / 2**20:.0f} MiB")
