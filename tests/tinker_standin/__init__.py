"""A small server that speaks the routes of Tinker's API which downloads use, for tests and examples.

The real `tinker` SDK talks to it through `TINKER_BASE_URL` (`Standin.url`):

    with Standin() as tinker:
        run = tinker.add_run(base_model="Qwen/Qwen3-8B", rank=8)
        path = run.add_checkpoint("external_weights", "final", Path("adapter"))   # tinker://…/external_weights/final

`python -m tests.tinker_standin FOLDER` serves every adapter below a folder. What goes wrong is asked for with `fail`.
It trains nothing: a checkpoint is files.
"""

from tests.tinker_standin._server import Standin
from tests.tinker_standin._state import KEY, Fault, Run

__all__ = ["KEY", "Fault", "Run", "Standin"]
