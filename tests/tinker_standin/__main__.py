"""`python -m tests.tinker_standin FOLDER`: serve every adapter below a folder, one run each, until interrupted.

The first lines it prints are JSON: `{"url", "key"}`, and `{"path"}` for each checkpoint. Each adapter is there in all
three kinds under the name `final`; those in folders `checkpoints/NAME` beside it are external weights of its run.
"""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path

from tests.tinker_standin import KEY, Standin


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tinker_standin")
    parser.add_argument("folder", type=Path, help="an adapter's folder, or one that holds several")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--base-model", help="of all of them; by default what adapter_config.json names")
    options = parser.parse_args()
    standin = Standin(options.port)
    paths = []
    for weights in sorted(options.folder.rglob("adapter_model.safetensors")):
        if weights.parent.parent.name == "checkpoints":
            continue
        config = json.loads((weights.parent / "adapter_config.json").read_text())
        base = options.base_model or config.get("base_model_name_or_path") or "unknown/base"
        run = standin.add_run(base_model=base, rank=config["r"])
        kinds = ("external_weights", "weights", "sampler_weights")
        paths += [run.add_checkpoint(kind, "final", weights.parent) for kind in kinds]
        for folder in sorted((weights.parent / "checkpoints").glob("*")):
            paths.append(run.add_checkpoint("external_weights", folder.name, folder))
    with standin:
        print(json.dumps({"url": standin.url, "key": KEY}), flush=True)
        for path in paths:
            print(json.dumps({"path": path}), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
