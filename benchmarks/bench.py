"""What every row works with: the stack, the options, and the reference models, loaded when first asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

import bathyscope
from bathyscope import Extraction
from bathyscope.types import ComputeDtype
from benchmarks import arithmetic
from benchmarks.reference import Reference
from benchmarks.stack import MODEL, Stack


@dataclass(slots=True)
class Bench:
    """One run."""

    stack: Stack
    client: bathyscope.Client
    full: bool
    """The large sizes."""
    console: Console
    patience: float
    """Seconds to wait for a quiet machine before a measurement."""
    threads: int = 0
    """Of the worker's torch and of the references'."""
    _references: dict[str, Reference] = field(default_factory=dict)
    _revision: str = ""

    def warm(self, dtype: ComputeDtype) -> None:
        """Have the worker load the model with that compute dtype, and run it once."""
        self._revision = str(self.extract(["The model is loaded."], dtype).identity.revision)

    def reference(self, dtype: str) -> Reference:
        """The transformers model of that dtype, from the files that the worker loads; `warm` comes first."""
        if dtype not in self._references:
            self._references[dtype] = Reference(self.stack.model_folder(self._revision), dtype, self.threads)
        return self._references[dtype]

    def extract(
        self, texts: list[str], dtype: ComputeDtype, *, layers: list[int] | None = None, wait: float = 60
    ) -> Extraction:
        """A finished extraction of last tokens."""
        job = self.client.extractions.create(
            wait=wait, model=MODEL, inputs=texts, layers=layers or "all", pooling="last", compute_dtype=dtype
        )
        return job.wait()

    def arithmetic(self, lengths: Sequence[int], top: int) -> Callable[[int], float]:
        """Texts of these lengths a second that the matrix products up to a layer allow, as done here now."""
        model = self.reference("float32").model
        per_text = arithmetic.work_of(model, top).of(lengths) / len(lengths)
        return lambda _round: arithmetic.matrix_rate(model, top) / per_text

    def own(self) -> list[int]:
        """The processes whose work is no disturbance."""
        return [*self.stack.processes().values(), os.getpid()]

    def say(self, text: str) -> None:
        """A line of progress."""
        self.console.print(f"[dim]{text}[/]", highlight=False)
