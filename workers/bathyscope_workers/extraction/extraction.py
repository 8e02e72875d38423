"""One extraction under way: inputs -> token ids -> a file of the right shape -> rows filled in by batches.

A row is a sequence of tokens under a variant (the base, or an adapter): row = variant * sequences + sequence. Inputs
are tokenised once. Mostly an input is one sequence; a question may need several, one of which carries its prompt's
states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bathyscope import errors
from bathyscope_workers.extraction.cache import RowCache
from bathyscope_workers.extraction.change import VariantChanges
from bathyscope_workers.extraction.choices import Questions
from bathyscope_workers.extraction.generation import Generation
from bathyscope_workers.extraction.inputs import chunks, count_lines
from bathyscope_workers.extraction.plan import Branches, Pending, Queue
from bathyscope_workers.extraction.prefixes import Shared, find
from bathyscope_workers.extraction.reuse import Reuse
from bathyscope_workers.extraction.scratch import ScratchFile
from bathyscope_workers.extraction.spec import ExtractionSpec
from bathyscope_workers.extraction.template import ChatRenderer
from bathyscope_workers.extraction.token_texts import TokenTexts
from bathyscope_workers.extraction.tokens import InputReader
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.versions import versions

FILE_NAME = "hidden_states.safetensors"
_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class ExtractionResult:
    """What a finished extraction left in its scratch folder."""

    path: str
    """A safetensors file: `hidden_states`, `token_ids`, `offsets`, provenance in its metadata."""
    bytes: int
    header_bytes: int
    """Length of the header with its length prefix: where the tensors begin."""
    tensors: dict[str, dict[str, Any]]
    """Of each tensor `{"dtype", "shape", "offset", "bytes"}`, offsets from the start of the file."""
    shape: list[int]
    """[inputs, layers, hidden]; with pooling none [tokens kept, layers, hidden]. A paired one has a first axis of
    variants before these."""
    dtype: str
    layers: list[int]
    """Resolved layer numbers in the order asked for."""
    inputs: int
    tokens: dict[str, int]
    """`total`: of the inputs; `computed`: with the padding of their batches, over all variants; `kept`: rows with
    pooling none, of one variant."""
    provenance: dict[str, Any]
    """What the numbers depend on; the file's metadata holds the same as strings."""
    relative_change: list[list[float | None]] | None
    """Of a paired one: for each variant one number a layer, in the order asked for: the mean over vectors of the norm
    of the difference from the first variant over the norm of that; None where no vector has such a number."""
    cache: dict[str, int]
    """Rows (of all variants) that were not computed: `hits` came from the cache, `duplicates` equal another row."""
    change: list[dict[str, list[float]]] | None = None
    """What `relative_change` is made of: for each variant but the first `{"sums", "counts"}`, a number a layer."""
    choices: dict[str, Any] | None = None
    """What `Questions.write` gives, of one whose choices were scored."""

    def to_wire(self) -> dict[str, Any]:
        """A JSON object."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Extraction:
    """The state of one extraction. Call `tokenise_step` until it says True, then fill rows, then `finish`."""

    def __init__(
        self,
        spec: ExtractionSpec,
        resident: Resident,
        *,
        inputs: list[Any] | None,
        inputs_path: str | None,
        scratch: str,
        renderer: ChatRenderer,
        max_result_bytes: int | None = None,
        variants: Sequence[str | None] = (None,),
        paired: bool = False,
        first_input: int = 0,
        owner: str = "",
        solo: bool = False,
        cache: RowCache | None = None,
    ) -> None:
        """`variants` are digests of adapters, which are attached and stay so until the end, None being the base.

        With `paired` the result has an axis of variants, also for a single one; several are always paired. Texts
        that begin alike share their beginning with those of the same `owner`, and with none when `solo`. The inputs are
        those of the request from `first_input` on.
        """
        self.spec = spec
        self.variants = tuple(variants)
        self.paired = paired or len(self.variants) > 1
        self.resident = resident
        self.layers = spec.resolve_layers(resident.facts.num_layers)
        self.slots = {layer: slot for slot, layer in enumerate(self.layers)}
        """Layer number to its place on the second axis of the result."""
        self.top = resident.facts.num_layers if spec.score_choices else max(self.layers)
        self.torch_dtype = _TORCH_DTYPES[spec.dtype]
        self.style = resident.style if spec.batch_invariant else resident.batched_style
        self.owner = owner
        self.branching = resident.branching and self.style == resident.style and not solo and self.top > 0
        """Whether rows that begin alike run as a tree."""
        self.total_inputs = len(inputs) if inputs is not None else count_lines(inputs_path)
        if self.total_inputs == 0:
            raise errors.InvalidRequest(
                "there is nothing to extract", errors=[{"pointer": "/inputs", "detail": "at least one input"}]
            )
        self.read_inputs = 0
        self.done_rows = 0
        self.computed_tokens = 0
        self.queues: list[Queue] = []
        """Rows still to be run, one queue a variant. One after the other: the fewer adapters meet in a batch, the less
        it costs."""
        self._changes: VariantChanges | None = None
        self.sequences = 0
        """Rows of one variant."""
        self._reader = InputReader(resident, spec, renderer, first_input=first_input)
        self.questions: Questions | None = None
        """What is asked about the inputs."""
        self._cache = cache
        self._reuse: Reuse | None = None
        """What need not be computed; null where every row must be."""
        self.generation: Generation | None = None
        """The answers in words that are still to be given."""
        if spec.score_choices:
            _ = resident.head, self._reader.encoder  # refuse before any input is read
            self.questions = Questions(
                spec, self._reader, alone=self.style.alone, own_max_length=resident.facts.max_length
            )
        self._chunks = chunks(inputs, inputs_path)
        self._rows: list[NDArray[np.int32]] = []
        self._row_lengths: list[int] = []
        self._scratch_dir = Path(scratch)
        self._texts = TokenTexts(self._reader, self._scratch_dir) if spec.per_token else None
        self._file: ScratchFile | None = None
        self._max_result_bytes = max_result_bytes

    # --- tokens ---

    @property
    def reading(self) -> bool:
        """Whether there are inputs left for `read_step`."""
        return self.read_inputs < self.total_inputs

    def read_step(self) -> bool:
        """Tokenise the next inputs; True when there are more. May run beside a forward pass for others: of what they
        share it uses the tokenizer alone. Raises as `tokenise_step` does."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        prepared = self._reader.prepare(self.read_inputs, chunk)
        rows = self._reader.encode(prepared)
        if self.questions is not None:
            self.questions.read(chunk, prepared, rows)
        if self._texts is not None:
            self._texts.read(prepared, rows)
        for index, ids in enumerate(rows, start=self.read_inputs):
            if len(ids):
                self._check_positions(index, len(ids))
        self.read_inputs += len(chunk)
        # One array a chunk: lists of millions of numbers would take eight times the memory.
        self._rows.append(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32))
        self._row_lengths += [len(ids) for ids in rows]
        return self.reading

    def tokenise_step(self) -> bool:
        """Tokenise the next inputs; True when all are done and the result file is laid out.

        Then look, some rows at a time, for what need not be computed. Raises errors.InvalidInput, errors.InvalidRequest
        or errors.TooLarge; errors.OutOfSpace when the disk is full.
        """
        if self._reuse is not None:
            return self._look()
        if self.read_step():
            return False
        self._reader.raise_faults()
        self._ids = np.concatenate(self._rows)
        self._rows.clear()
        self._lengths = np.array(self._row_lengths, dtype=np.int64)
        self._starts = _running_sums(self._lengths)
        self._sequence_ids, self._sequence_starts, lengths = self._ids, self._starts, self._lengths
        self._carried: NDArray[np.int64] | None = None
        self.sequences = self.total_inputs
        if self.questions is not None:
            self._sequence_ids, lengths, self._carried = self.questions.lay_out(len(self.variants))
            self._sequence_starts = _running_sums(lengths)
            self.sequences = len(lengths)
            if self.questions.open:
                self.generation = Generation(self)
        self._lay_out()
        if self.questions is None and self.style == self.resident.style:
            self._reuse = Reuse(self, self._cache, self.owner)
            return self._look()
        self._plan(lengths)
        return True

    def _look(self) -> bool:
        assert self._reuse is not None
        if not self._reuse.look_step():
            return False
        self._plan(self._lengths, self._reuse.missing)
        return True

    def _plan(self, lengths: NDArray[np.int64], missing: Sequence[NDArray[np.int64]] | None = None) -> None:
        """Queue every row, of each variant those `missing`: those that begin alike apart from those that batches take
        by their length."""
        self._ahead: NDArray[np.int64] | None = None
        before: NDArray[np.int64] | None = None
        for number, adapter in enumerate(self.variants):
            first = number * self.sequences
            rows = np.arange(self.sequences) if missing is None else missing[number]
            apart, order = rows, rows[:0]
            if self.branching and len(rows):
                if before is None or not np.array_equal(rows, before):
                    found, before = self._alike(rows, lengths), rows
                order, apart = rows[found.order], rows[found.apart]
            if len(order):
                if self._ahead is None:
                    self._ahead = np.zeros(self.total_rows, dtype=np.int64)
                self._ahead[first + order[:-1]] = found.shared[1:]
                self.queues.append(Queue(adapter, first, Branches(order, lengths[order], found.shared)))
            self.queues.append(Queue(adapter, first, Pending(lengths[apart], apart)))

    def _alike(self, rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> Shared:
        """Which of some sequences begin alike, by their place in `rows`."""
        if len(rows) == self.sequences:
            return find(self._sequence_ids, self._sequence_starts)
        return find(np.concatenate([self.row_ids(int(row)) for row in rows]), _running_sums(lengths[rows]))

    @property
    def total_rows(self) -> int:
        """Sequences times variants."""
        return self.sequences * len(self.variants)

    @property
    def answering(self) -> bool:
        """Whether answers in words are still to be given."""
        return self.generation is not None and self.generation.waiting

    def adapter_of(self, row: int) -> str | None:
        """The adapter that a row runs under."""
        return self.variants[row // self.sequences]

    def group_of(self, adapter: str | None) -> str | None:
        """Rows of equal groups may share a batch."""
        return None if adapter is None else self.resident.adapters.group(adapter)

    def row_ids(self, row: int) -> NDArray[np.int32]:
        """Token ids of a row."""
        number = row % self.sequences
        return self._sequence_ids[self._sequence_starts[number] : self._sequence_starts[number + 1]]

    def ahead(self, row: int) -> int:
        """Tokens that a row has in common with the next one of its queue; 0 for one that is queued by length."""
        return 0 if self._ahead is None else int(self._ahead[row])

    def keep_nothing(self) -> None:
        """From now on no batch keeps a beginning for the next: memory does not allow it."""
        self._ahead = None

    @property
    def reads_beginnings(self) -> bool:
        """Whether states of other tokens than the last are asked for."""
        return self.spec.pooling != "last" or self.spec.positions is not None

    def first_wanted(self, row: int, *, pooled: bool) -> int:
        """The first token of a row that its pass must compute: one that is scored, or (with `pooled`) pooled."""
        wanted = int(self._sequence_starts[row % self.sequences + 1] - self._sequence_starts[row % self.sequences])
        if self.questions is not None:
            positions = self.questions.targets(row % self.sequences)[1]
            wanted = int(positions.min(initial=wanted))
        number = self.carried(row)
        if pooled and number is not None:
            wanted = int(self.kept_tokens(number).min(initial=wanted))
        return wanted

    def carried(self, row: int) -> int | None:
        """The input whose states come from a row, if any do."""
        number = row % self.sequences
        if self._carried is None:
            return number
        found = int(self._carried[number])
        return None if found < 0 else found

    def kept_tokens(self, number: int) -> NDArray[np.int64]:
        """Positions in an input of the tokens that are pooled, or kept with pooling none."""
        length = int(self._lengths[number])
        positions, pooling = self.spec.positions, self.spec.pooling
        if positions is not None and positions.tokens is not None:
            return np.array([one + length if one < 0 else one for one in positions.tokens], dtype=np.int64)
        begin, end = _resolve_span(positions.span, length) if positions and positions.span else (0, length)
        if pooling == "last":
            begin = end - 1
        elif pooling == "first":
            end = begin + 1
        return np.arange(begin, end, dtype=np.int64)

    def first_target(self, row: int) -> int:
        """Where the result of a row that carries an input's states begins in `states`."""
        variant, number = row // self.sequences, self.carried(row)
        assert number is not None
        targets = self._targets
        return int(variant * targets[-1] + targets[number])

    def vectors(self, number: int) -> int:
        """How many vectors of the result an input has."""
        return int(self._targets[number + 1] - self._targets[number])

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute; equal rows may still have to be filled."""
        return self.done_rows == self.total_rows and not self.answering

    def computed(self, rows: Sequence[int]) -> None:
        """A batch with these rows is over."""
        if self._reuse is not None:
            self._reuse.computed(rows)

    def fill_step(self) -> bool:
        """Of a complete one: fill some more rows that equal others; True when there are none left."""
        return self._reuse is None or self._reuse.fill_step()

    def compare(self, rows: Sequence[int]) -> None:
        """Note how far these rows, which carry states and are written, are from those of the first variant."""
        if self._changes is not None and rows:
            variants = np.array(rows, dtype=np.int64) // self.sequences
            inputs = np.array([self.carried(row) for row in rows], dtype=np.int64)
            for variant in np.unique(variants):
                self._changes.finished(int(variant), inputs[variants == variant])

    def _check_positions(self, index: int, length: int) -> None:
        positions = self.spec.positions
        if positions is None:
            return
        if positions.tokens is not None:
            wrong = next((one for one in positions.tokens if not -length <= one < length), None)
            if wrong is not None:
                self._reader.fault(index, f"has {length} tokens, so there is no token {wrong} (positions.tokens)")
            return
        assert positions.span is not None
        begin, end = _resolve_span(positions.span, length)
        if not 0 <= begin < end <= length:
            asked = f"[{positions.span[0]}, {positions.span[1]})"
            self._reader.fault(index, f"has {length} tokens, so the span {asked} is empty or beyond them")

    # --- the result ---

    def _lay_out(self) -> None:
        """Reserve the result file and write all of it but the states."""
        inputs, hidden = len(self._lengths), self.resident.facts.hidden_size
        restricted = self.spec.pooling == "none" and self.spec.positions is not None
        if restricted:
            kept = [self.kept_tokens(row) for row in range(inputs)]
            self._offsets = _running_sums(np.array([len(one) for one in kept], dtype=np.int64))
            token_ids = np.concatenate([self._ids[self._starts[row] + one] for row, one in enumerate(kept)])
        else:
            self._offsets, token_ids = self._starts, self._ids
        self._targets = self._offsets if self.spec.pooling == "none" else np.arange(inputs + 1)
        shape: tuple[int, ...] = (int(self._targets[-1]), len(self.layers), hidden)
        if self.paired:
            shape = (len(self.variants), *shape)
        size = math.prod(shape) * self.torch_dtype.itemsize
        if self._max_result_bytes is not None and size > self._max_result_bytes:
            raise errors.TooLarge(
                f"the result would take {size} bytes, the limit is {self._max_result_bytes}: ask for fewer layers or "
                "inputs, pool, or choose dtype float16",
                bytes=size,
                limit=self._max_result_bytes,
            )
        self._file = ScratchFile(
            self._scratch_dir / FILE_NAME,
            {
                "offsets": ("int64", (inputs + 1,)),
                "token_ids": ("int64", (len(token_ids),)),
                "hidden_states": (self.spec.dtype, shape),
            },
            {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.provenance().items()},
        )
        self._file.tensor("offsets")[:] = torch.from_numpy(self._offsets)
        self._file.tensor("token_ids")[:] = torch.from_numpy(token_ids)
        self.states = self._file.tensor("hidden_states").view(-1, len(self.layers), hidden)
        """(rows, layers, hidden), in the file; the rows of one variant after those of another."""
        if self.paired:
            self._changes = VariantChanges(self.states, len(self.variants), self._targets)

    def provenance(self) -> dict[str, Any]:
        """What the numbers depend on."""
        facts = self.resident.facts
        return {
            "model": self.resident.spec.name,
            "revision": facts.revision,
            "quantization": facts.quantization,
            "llm_int8_threshold": facts.llm_int8_threshold,
            "compute_dtype": facts.compute_dtype,
            "adapter": self.variants[0] if not self.paired else None,
            "variants": list(self.variants),
            "num_layers": facts.num_layers,
            "layers": self.layers,
            "pooling": self.spec.pooling,
            "positions": self.spec.positions.to_wire() if self.spec.positions else None,
            "template": self.spec.template,
            "add_generation_prompt": self.spec.add_generation_prompt,
            "max_length": self._reader.max_length,
            "truncation": self.spec.truncation,
            "dtype": self.spec.dtype,
            "batch_invariant": self.spec.batch_invariant,
            "versions": versions(),
        }

    def finish(self) -> ExtractionResult:
        """Close the file once every row is written."""
        assert self._file is not None
        file = self._file
        changes, self._changes = self._changes, None
        reuse, self._reuse = self._reuse, None
        del self.states
        file.close()
        choices = None if self.questions is None else self.questions.write(self._scratch_dir)
        return ExtractionResult(
            path=str(file.path),
            bytes=file.nbytes,
            header_bytes=file.header_bytes,
            tensors={name: place.to_wire() for name, place in file.places.items()},
            shape=list(file.places["hidden_states"].shape),
            dtype=self.spec.dtype,
            layers=self.layers,
            inputs=len(self._lengths),
            tokens={
                "total": int(self._lengths.sum()),
                "computed": self.computed_tokens,
                "kept": int(self._offsets[-1]),
            },
            provenance=self.provenance(),
            relative_change=None if changes is None else changes.relative_change(),
            change=None if changes is None else changes.to_wire(),
            cache={"hits": reuse.hits, "duplicates": reuse.duplicates} if reuse else {"hits": 0, "duplicates": 0},
            choices=choices,
        )

    def discard(self) -> None:
        """Stop: no more rows, no file."""
        self.queues.clear()
        self._changes = self.generation = self._reuse = None
        if hasattr(self, "states"):
            del self.states
        if self._file is not None:
            self._file.discard()


def _resolve_span(span: tuple[int, int | None], length: int) -> tuple[int, int]:
    begin, end = span
    last = length if end is None else end + length if end < 0 else end
    return (begin + length if begin < 0 else begin), last


def _running_sums(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    sums = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=sums[1:])
    return sums
