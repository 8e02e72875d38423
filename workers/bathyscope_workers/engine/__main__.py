"""`python -m bathyscope_workers.engine --kind model|cpu|fetch --fd N`; see `protocol` for what is said over fd N."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from bathyscope_backplane import logs
from bathyscope_workers.engine.process import die_with_parent, ignore_interrupts
from bathyscope_workers.engine.protocol import EXIT_DEVICE_FAULT

if TYPE_CHECKING:
    from bathyscope_workers.extraction.cache import CacheOptions

_log = structlog.get_logger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Serve the pipe; returns the exit status."""
    options = _parser().parse_args(arguments)
    die_with_parent()
    ignore_interrupts()
    logs.configure(options.log_level, process=f"{options.kind}-engine", worker=options.worker)
    # Read when the libraries are first imported, below. Threads that spin at every barrier make a busy machine
    # five times slower (measured: eight runnable processes on two cores), and an idle one hardly faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from bathyscope_workers.engine.channel import Channel

    # The supervisor is gone: nothing done from now on would reach anyone, so no batch is worth finishing.
    channel = Channel(socket.socket(fileno=options.fd), on_close=lambda: os._exit(0))
    channel.start()
    if options.kind != "model":
        from bathyscope_workers.engine.cpu_engine import CpuEngine

        CpuEngine(channel).run()
        return 0
    import torch

    from bathyscope_workers.engine.model_engine import ModelEngine, ModelEngineSettings
    from bathyscope_workers.engine.problems import DeviceFault

    logs.take_over()  # what these libraries set up when they were imported
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = ModelEngineSettings(
        batch_tokens=options.batch_tokens,
        memory_bytes=options.memory_bytes,
        force_cpu=options.cpu,
        template_seconds=options.template_seconds,
        cache=_cache(options),
    )
    try:
        ModelEngine(channel, settings).run()
    except DeviceFault:
        _log.exception("device.lost")
        os._exit(EXIT_DEVICE_FAULT)
    return 0


def _cache(options: argparse.Namespace) -> CacheOptions | None:
    from bathyscope_workers.extraction.cache import MIN_BYTES, CacheOptions

    if options.cache_dir is None or options.cache_bytes < MIN_BYTES:
        return None
    return CacheOptions(options.cache_dir, options.cache_bytes, options.cache_free_bytes, options.cache_shared)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bathyscope_workers.engine")
    parser.add_argument("--kind", choices=("model", "cpu", "fetch"), required=True)
    parser.add_argument("--fd", type=int, required=True, help="this end of a stream socketpair")
    parser.add_argument("--batch-tokens", type=int, help="padded tokens a batch (512 on CPU, 16384 on CUDA)")
    parser.add_argument("--memory-bytes", type=int, help="bound of resident models (a share of the device's memory)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (all cores)")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU although there is a GPU")
    parser.add_argument("--template-seconds", type=float, default=5.0, help="deadline of one chat template")
    parser.add_argument("--cache-dir", type=Path, help="folder of rows that were computed before (none are kept)")
    parser.add_argument("--cache-bytes", type=int, default=0, help="bound of that folder")
    parser.add_argument("--cache-free-bytes", type=int, default=0, help="bytes of its disk that stay free")
    parser.add_argument("--cache-shared", action="store_true", help="rows of one API key serve another")
    parser.add_argument("--worker", help="name of the worker, for the log")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
