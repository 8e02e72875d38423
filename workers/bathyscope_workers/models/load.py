"""From a spec to a resident model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bathyscope import errors
from bathyscope_workers.models import selftest
from bathyscope_workers.models.device import Device, fraction_quantized, is_device_fault, is_out_of_memory, weight_bytes
from bathyscope_workers.models.forward import Forward, Style, styles
from bathyscope_workers.models.past import may_branch
from bathyscope_workers.models.resident import Resident, ResidentFacts
from bathyscope_workers.models.source import LoadFault, Source, failed, locate, weight_sizes
from bathyscope_workers.models.spec import ModelSpec
from bathyscope_workers.models.tuning import batch_tokens

log = logging.getLogger(__name__)

Tick = Callable[[], None]
"""Called between the phases of a load: the engine's sign of life."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.57}
"""Of one weight of a quantized `nn.Linear`; 4bit with its scales of 64 weights each."""


def quiet_libraries() -> None:
    """Keep progress bars and a line per layer per call out of the logs."""
    from transformers.utils import logging as transformers_logging

    disable: Callable[[], None] = transformers_logging.disable_progress_bar
    disable()
    # LLM.int8: "inputs will be cast from float32 to float16", for every layer of every call.
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


def estimate_bytes(folder: Path, spec: ModelSpec) -> int:
    """What a model will take in memory, from the headers of its files; `weight_bytes` measures it after the load.

    Raises LoadFault for headers that cannot be read.
    """
    width = _BYTES[spec.compute_dtype]
    total = 0.0
    try:
        sizes = weight_sizes(folder)
    except ValueError as error:
        raise failed(spec, f"the header of its weights cannot be read: {error}") from error
    for name, shape in sizes:
        size = 1
        for side in shape:
            size *= side
        # bitsandbytes quantizes nn.Linear: matrices other than the embeddings and the output head.
        is_linear = len(shape) == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
        quantized = spec.quantization != "none" and is_linear
        total += size * (_QUANTIZED_BYTES[spec.quantization] if quantized else width)
    return int(total)


def load_resident(
    spec: ModelSpec,
    device: Device,
    *,
    source: Source | None = None,
    tick: Tick = lambda: None,
    room_bytes: int | None = None,
) -> Resident:
    """Load, measure and self-test a model.

    `source` is what `locate(spec)` gave. `room_bytes` bounds the unquantized model, or that in float32, which is loaded
    for a moment to compare this one with; None asks the device. Raises LoadFault, which carries the problem to tell
    (`model-load-failed`, or `out-of-memory`); any other exception is a fault of the device.
    """
    quiet_libraries()
    started = time.monotonic()
    spec = spec.resolved(device.type)
    source = source or locate(spec)
    try:
        config, tokenizer = _read_config(spec, source), _read_tokenizer(source)
        tick()
        against = _exacter_states(spec, source, config, tokenizer, device, tick, room_bytes)
        before = device.used_bytes()
        model = _read_model(spec, source, config, device)
        tick()
        resident = _resident(spec, source, config, tokenizer, model, device, tick, against)
    except LoadFault:
        raise
    except Exception as error:
        if is_device_fault(error):
            raise
        if is_out_of_memory(error):
            problem = errors.OutOfMemory(
                f"{spec.name}: its weights do not fit into the memory of {device.description}", model=spec.name
            )
            raise LoadFault(problem, retry=False) from error
        log.exception("loading %s failed", spec.key)
        raise failed(spec, _reason(error)) from error
    resident.facts.memory_growth_bytes = max(0, device.used_bytes() - before)
    resident.facts.load_seconds = round(time.monotonic() - started, 3)
    return resident


def _read_config(spec: ModelSpec, source: Source) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    if spec.quantization != "none" and getattr(config, "quantization_config", None) is not None:
        raise failed(
            spec, f"its weights are quantized already; load it with quantization none, not {spec.quantization}"
        )
    return config


def _read_tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    if not any((source.folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)


def _is_causal(config: Any) -> bool:
    """A decoder, by the class the checkpoint names, else by what transformers has for its configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    names = config.architectures or []
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return True
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _read_model(spec: ModelSpec, source: Source, config: Any, device: Device) -> Any:
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    bits_and_bytes: Callable[..., Any] = transformers.BitsAndBytesConfig

    arguments: dict[str, Any] = {
        "config": config,
        "dtype": _DTYPES[spec.compute_dtype],
        "trust_remote_code": False,
        "use_safetensors": True,
        "local_files_only": True,
    }
    if spec.quantization == "8bit":
        arguments["quantization_config"] = bits_and_bytes(load_in_8bit=True, llm_int8_threshold=spec.llm_int8_threshold)
    elif spec.quantization == "4bit":
        arguments["quantization_config"] = bits_and_bytes(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_DTYPES[spec.compute_dtype]
        )
    if device.type == "cuda":
        arguments["device_map"] = "auto" if device.count > 1 else {"": 0}
    elif spec.quantization != "none":
        arguments["device_map"] = {"": "cpu"}
    # A checkpoint of the bare model (an embedding model, say) has no head to load.
    has_head = any(not name.endswith("Model") or name.endswith("LMHeadModel") for name in config.architectures or [])
    auto = AutoModelForCausalLM if _is_causal(config) and has_head else AutoModel
    model = auto.from_pretrained(source.folder, **arguments)
    model.eval()
    model.requires_grad_(False)
    return model


def _inner(model: Any, config: Any) -> Any:
    """The module that ends with the final norm: no LM head, no vision tower."""
    if not _is_causal(config):
        return model.base_model
    return model.get_decoder()


def _forward(model: Any, config: Any, device: Device) -> Forward:
    text = config.get_text_config()
    causal = _is_causal(config)
    pad = getattr(text, "pad_token_id", None)
    if causal:
        # Any token does; another than the pad token keeps models from warning of padding without a mask.
        pad = 0 if pad != 0 else 1
    return Forward(
        _inner(model, config),
        num_layers=int(text.num_hidden_layers),
        causal=causal,
        pad_id=int(pad or 0),
        device=torch.device("cpu" if device.type == "cpu" else "cuda:0"),
    )


def _max_length(spec: ModelSpec, config: Any, forward: Forward) -> int | None:
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if own is not None and not forward.causal:
        # RoBERTa's table of positions begins after the padding index.
        for module in forward.inner.modules():
            offset = getattr(getattr(module, "position_embeddings", None), "padding_idx", None)
            if isinstance(offset, int):
                own -= offset + 1
                break
    limits = [limit for limit in (own, spec.max_length) if limit]
    return min(limits) if limits else None


def _resident(
    spec: ModelSpec,
    source: Source,
    config: Any,
    tokenizer: Any,
    model: Any,
    device: Device,
    tick: Tick,
    against: selftest.States | None,
) -> Resident:
    forward = _forward(model, config, device)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    max_length = _max_length(spec, config, forward)
    rows = selftest.token_rows(_encoder(tokenizer), vocab_size, max_length)
    expected = selftest.reference(model, rows, forward.device, tick)
    style, test = _choose_style(spec, forward, rows, expected, tick)
    batched_style = style
    if spec.quantization == "8bit" and spec.llm_int8_threshold > 0 and not style.alone:
        # LLM.int8 picks its outlier columns over the whole batch.
        style = Style(style.capture, mask=style.mask, alone=True)
        test.comparison = selftest.compare(selftest.run(forward, rows, style), expected)
    branching = test.passed and _branches(spec, model, forward, rows, style, tick)
    if spec.quantization == "none":
        _references(spec, source, rows).save(selftest.last_tokens(expected))
    if against is not None:
        comparison = selftest.compare(selftest.last_tokens(expected), against)
        if spec.quantization == "none":
            test.against_float32 = comparison
        else:
            test.against_unquantized = comparison
    tuned = batch_tokens(forward, style, vocab_size=vocab_size, longest=max_length, tick=tick)
    facts = ResidentFacts(
        num_layers=forward.num_layers,
        hidden_size=int(config.get_text_config().hidden_size),
        architecture=type(model).__name__,
        causal=forward.causal,
        max_length=max_length,
        vocab_size=vocab_size,
        memory_bytes=weight_bytes(model),
        memory_growth_bytes=0,
        fraction_quantized=round(fraction_quantized(model), 4),
        quantization=spec.quantization,
        llm_int8_threshold=spec.llm_int8_threshold if spec.quantization == "8bit" else None,
        compute_dtype=spec.compute_dtype,
        revision=source.revision,
        has_chat_template=False,
        has_tokenizer=tokenizer is not None,
        style=str(style),
        batch_tokens=tuned,
        load_seconds=0.0,
        self_test=test.to_wire(),
    )
    resident = Resident(
        spec,
        model=model,
        forward=forward,
        tokenizer=tokenizer,
        style=style,
        batched_style=batched_style,
        self_test=test,
        facts=facts,
        branching=branching,
    )
    facts.has_chat_template = resident.chat_template is not None
    return resident


def _choose_style(
    spec: ModelSpec, forward: Forward, rows: list[Any], expected: selftest.States, tick: Tick
) -> tuple[Style, selftest.SelfTest]:
    """The first style that passes, or the plain call text by text, with `passed` false when even that differs."""
    chosen: tuple[Style, selftest.Comparison] | None = None
    for style in styles(causal=forward.causal, has_blocks=forward.has_blocks):
        tick()
        try:
            comparison = selftest.compare(selftest.run(forward, rows, style), expected)
        except Exception as error:  # an architecture that cannot be run so: the next style
            if is_device_fault(error) or is_out_of_memory(error):
                raise
            log.warning("%s cannot be run with %s: %s", spec.key, style, error)
            continue
        chosen = (style, comparison)
        if selftest.passes(comparison, compute_dtype=spec.compute_dtype, quantized=spec.quantization != "none"):
            return style, selftest.SelfTest(len(rows), comparison, passed=True)
        log.warning("%s with %s: relative error %.3g", spec.key, style, comparison.max_relative_error)
    if chosen is None:
        raise failed(spec, "none of the ways to read its hidden states works on this architecture")
    return chosen[0], selftest.SelfTest(len(rows), chosen[1], passed=False)


def _branches(spec: ModelSpec, model: Any, forward: Forward, rows: list[Any], style: Style, tick: Tick) -> bool:
    """Whether texts that begin alike have the states they have alone when they run as a tree."""
    if not forward.causal or style.alone or style.capture != "hooks" or not may_branch(model.config):
        return False
    texts, trunk = selftest.branches(rows)
    if not trunk:
        return False
    expected = selftest.reference(model, texts, forward.device, tick)
    tick()
    try:
        together, apart = selftest.run_branches(forward, texts, trunk)
    except Exception as error:  # an architecture that takes no positions, masks or caches of this kind
        if is_device_fault(error) or is_out_of_memory(error):
            raise
        log.info("%s: no beginnings are shared: %s", spec.key, error)
        return False
    for found, wanted in ((together, expected), (apart, [one[trunk:] for one in expected])):
        comparison = selftest.compare(found, wanted)
        if not selftest.passes(comparison, compute_dtype=spec.compute_dtype, quantized=spec.quantization != "none"):
            log.info("%s: no beginnings are shared: error %.3g", spec.key, comparison.max_relative_error)
            return False
    return True


def _exacter_states(
    spec: ModelSpec, source: Source, config: Any, tokenizer: Any, device: Device, tick: Tick, room_bytes: int | None
) -> selftest.States | None:
    """What this model's states are compared with: the unquantized model's, or of an unquantized one in lower precision
    those in float32; from disk or, where it fits, from loading it for a moment."""
    if spec.quantization != "none":
        plain = replace(spec, quantization="none")
    elif spec.compute_dtype != "float32":
        plain = replace(spec, compute_dtype="float32")
    else:
        return None
    vocab_size = int(config.get_text_config().vocab_size)
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (own, spec.max_length) if limit]
    rows = selftest.token_rows(_encoder(tokenizer), vocab_size, min(limits) if limits else None)
    references = _references(plain, source, rows)
    known = references.load()
    if known is not None:
        return known
    room = device.free_bytes() * 0.8 if room_bytes is None else room_bytes
    if estimate_bytes(source.folder, plain) > room:
        log.info("%s: %s does not fit beside what is loaded, so it is not compared", spec.key, plain.key)
        return None
    model = _read_model(plain, source, config, device)
    tick()
    states = selftest.last_tokens(selftest.reference(model, rows, _forward(model, config, device).device, tick))
    references.save(states)
    del model
    device.give_back()
    return states


def _references(spec: ModelSpec, source: Source, rows: list[Any]) -> selftest.ReferenceStates:
    return selftest.ReferenceStates(
        spec.data_dir, name=spec.name, revision=source.revision, compute_dtype=spec.compute_dtype, rows=rows
    )


def _encoder(tokenizer: Any) -> Callable[[str], list[int]] | None:
    if tokenizer is None:
        return None
    return lambda text: list(tokenizer(text)["input_ids"])


def _reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    if "trust_remote_code" in str(error):
        return "it needs code from its own repository, which is never run here"
    return f"{type(error).__name__}: {first}"[:500]
