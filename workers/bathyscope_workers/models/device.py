"""The device a worker computes on, and how much of its memory models may take."""

from __future__ import annotations

import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

_CPU_SHARE = 0.6
"""Of the machine's memory for models on CPU; the rest is for activations, page cache and the other processes."""
_CUDA_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors live. With several GPUs a model may be spread over all of them."""

    type: str
    """`cpu` or `cuda`."""
    count: int
    limit_bytes: int
    """The bound under which models are kept resident."""

    @classmethod
    def pick(cls, *, limit_bytes: int | None = None, force_cpu: bool = False) -> Device:
        """CUDA when there is one, else the CPU."""
        if torch.cuda.is_available() and not force_cpu:
            count = torch.cuda.device_count()
            total = sum(torch.cuda.get_device_properties(index).total_memory for index in range(count))
            return cls("cuda", count, limit_bytes or int(total * _CUDA_SHARE))
        return cls("cpu", 1, limit_bytes or int(machine_memory() * _CPU_SHARE))

    @property
    def name(self) -> str:
        """`cpu`, `cuda:0`, or `cuda` when a model may spread over several."""
        return "cpu" if self.type == "cpu" else "cuda:0" if self.count == 1 else "cuda"

    @property
    def description(self) -> str:
        """The hardware's own name."""
        if self.type == "cuda":
            return f"{self.count} x {torch.cuda.get_device_name(0)}"
        return f"{torch.get_num_threads()} CPU threads"

    def used_bytes(self) -> int:
        """Allocated by this process: on the GPUs, or resident in memory on CPU."""
        if self.type == "cuda":
            return sum(torch.cuda.memory_allocated(index) for index in range(self.count))
        return int(psutil.Process().memory_info().rss)

    def free_bytes(self) -> int:
        """What could still be allocated now."""
        if self.type == "cuda":
            return sum(torch.cuda.mem_get_info(index)[0] for index in range(self.count))
        return min(int(psutil.virtual_memory().available), machine_memory())

    def give_back(self) -> None:
        """Return freed memory to the device or the kernel, so that the next measurement is true."""
        gc.collect()
        self.trim()

    def trim(self) -> None:
        """The same without looking for what only refers to itself, which takes a tenth of a second."""
        if self.type == "cuda":
            torch.cuda.empty_cache()
        else:
            _malloc_trim()


def machine_memory() -> int:
    """Bytes this process may use in all: the machine's, or its control group's where that is less."""
    total = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and quantization states; shared storage counts once."""
    seen: dict[int, int] = {}

    def count(value: object) -> None:
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()

    for parameter in model.parameters():
        count(parameter)
        count(getattr(parameter, "SCB", None))  # LLM.int8's scale of each row
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            count(getattr(part, "absmax", None))
            count(getattr(part, "code", None))
    for buffer in model.buffers():
        count(buffer)
    return sum(seen.values())


def fraction_quantized(model: nn.Module) -> float:
    """Share of the model's parameters that are held in 8 or 4 bits.

    bitsandbytes replaces `nn.Linear` only: embeddings, norms and experts held as 3-D parameters stay as they are.
    """
    quantized = total = 0
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_quantized = type(parameter).__name__ in ("Int8Params", "Params4bit")
            # A 4-bit weight is packed, its own shape says nothing.
            size = (
                int(getattr(module, "in_features")) * int(getattr(module, "out_features"))  # noqa: B009
                if is_quantized and name == "weight"
                else parameter.numel()
            )
            total += size
            quantized += size if is_quantized else 0
    return quantized / total if total else 0.0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of a forward pass or a load means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )


def is_device_fault(error: BaseException) -> bool:
    """Whether the accelerator's context is lost: nothing but a new process helps."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def _malloc_trim() -> None:
    if os.name == "posix":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
