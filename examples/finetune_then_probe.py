"""Train a LoRA, save it as Tinker would, and see what it changes inside the model, quantized or not.

SmolLM2 is trained for about two minutes to say "True" or "False" after statements about capital cities. The adapter is
written in Tinker's layout and served by the stand-in of Tinker. The service fetches it by its tinker:// path, attaches
it to the unquantized, the 8bit and the 4bit base, and runs statements about other countries through base and fine-tuned
model. Two tables show how far the hidden states moved and how well a linear probe tells true from false on each. Two
comparisons follow, with the intervals of the differences: the base with every checkpoint of the training, by step, and
the fine-tuned model under each quantization; their reports are pages of HTML.

    TINKER_BASE_URL=http://127.0.0.1:8123 .venv/bin/bathyscope up                                 # in one terminal
    TINKER_BASE_URL=http://127.0.0.1:8123 TINKER_API_KEY=tml-standin-key \\
        .venv/bin/python examples/finetune_then_probe.py                                          # in another

With --checkpoint nothing is trained: it is fetched from wherever TINKER_BASE_URL points, by default Tinker itself.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bathyscope import reports
from common import PATIENCE, auroc, connected, load_base, options, run, served, standin_port, statements

RANK = 8
ALPHA = 32  # Tinker's, whatever the rank
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
BATCH = 8
LEARNING_RATE = 3e-4


def train(weights: Path | None, steps: int, save: Callable[[int, dict[str, Any]], None]) -> None:
    """Teach the base to judge statements. `save` is given the adapter's tensors, with the names that PEFT gives them,
    at each third of the way."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from torch.nn.functional import cross_entropy

    base, tokenizer = load_base(weights, "float32")
    tokenizer.padding_side = "left"  # so that every text ends in the last column
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    verdicts = torch.tensor([tokenizer(word).input_ids[0] for word in (" False", " True")])
    texts, _ = statements()
    shuffler, began = random.Random(0), time.monotonic()
    for step in range(1, steps + 1):
        batch = shuffler.sample(texts, BATCH)
        tokens = tokenizer([statement.text for statement in batch], return_tensors="pt", padding=True)
        logits = model(**tokens, logits_to_keep=1).logits[:, -1]  # (batch, vocabulary)
        loss: Any = cross_entropy(logits, verdicts[[int(statement.label) for statement in batch]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(f"  step {step} of {steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
        if step in (steps // 3, 2 * steps // 3, steps):
            # Else PEFT would add the whole output head to it.
            save(step, dict(get_peft_model_state_dict(model, save_embedding_layers=False)))


def save_as_tinker(tensors: dict[str, Any], base_model: str, folder: Path) -> None:
    """Write an adapter as Tinker's checkpoints are: the output head has another name, the config says little."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    prefix = "base_model.model."
    renamed = {
        name.replace(f"{prefix}lm_head.", f"{prefix}model.unembed_tokens."): tensor.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "bias": "none", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base_model}, indent=2))
    (folder / "checkpoint_complete").write_text("")


def saver(base_model: str, folder: Path, steps: int) -> Callable[[int, dict[str, Any]], None]:
    """Saves the end of a training in `folder` and what came before it in `folder/checkpoints`."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a training before, perhaps of other steps

    def save(step: int, tensors: dict[str, Any]) -> None:
        save_as_tinker(tensors, base_model, folder if step == steps else folder / "checkpoints" / f"step-{step}")

    return save


def compare(client: Any, checkpoint: str, args: Any) -> None:
    """Fetch the checkpoint, run base and fine-tuned on the same texts under each quantization, and print tables."""
    print(f"The service fetches {checkpoint} …", flush=True)
    adapter = client.adapters.create(source=checkpoint, base_model=args.model).wait(PATIENCE, progress=True)
    print(f"{adapter.id}: {adapter.tensors.applied} of {adapter.tensors.read} tensors applied, rank {adapter.rank}")
    _, texts = statements(args.pairs)
    changes, probes = [], []
    for quantization in args.quantizations:
        print(f"{quantization}: {len(texts)} statements through base and fine-tuned …", flush=True)
        states = client.extractions.create(
            model=args.model,
            quantization=quantization,
            adapter=["base", adapter.id],
            inputs=[statement.text for statement in texts],
            layers="every:5",
        ).wait(PATIENCE, progress=True)
        moved = ("-" if change is None else f"{change:.4f}" for change in states.relative_change[1])
        changes.append([quantization, *moved])
        found = [
            client.probes.create(
                extraction=states.id,
                variant=variant,
                labels=[statement.label for statement in texts],
                groups=[statement.group for statement in texts],
                C=[0.01],
            ).wait(PATIENCE, progress=True)
            for variant in ("base", adapter.id)
        ]
        probes.append([quantization, *map(auroc, found)])
    print("\nChange of the hidden states: norm of the difference over norm of the base's")
    table(["quantization", *(f"layer {layer}" for layer in states.layers)], changes, 9)
    print("\nAUROC of a linear probe, cross-validated (95 % interval), and the layer it chose")
    table(["quantization", "base", "fine-tuned"], probes, 32)


def report(client: Any, run: str, args: Any) -> None:
    """The base against every checkpoint of the run, and the fine-tuned model under each quantization."""
    _, texts = statements(args.pairs)
    rows: dict[str, Any] = {
        "model": args.model,
        "inputs": [statement.text for statement in texts],
        "labels": [statement.label for statement in texts],
        "groups": [statement.group for statement in texts],
        "layers": "every:5",
        "C": [0.01],
    }
    print(f"\nThe base and every checkpoint of tinker://{run} on {len(texts)} statements …", flush=True)
    checkpoints = client.comparisons.create(
        variants=["base", f"tinker://{run}/*"], name="checkpoints of the fine-tune", **rows
    ).wait(PATIENCE, progress=True)
    show(checkpoints, args.reports / "checkpoints.html")
    if len(args.quantizations) > 1:
        print(f"\nThe fine-tuned model as {', '.join(args.quantizations)} …", flush=True)
        quantized = client.comparisons.create(
            quantizations=args.quantizations,
            adapter=checkpoints.variants[-1].adapter,
            name="quantizations of the fine-tune",
            **rows,
        ).wait(PATIENCE, progress=True)
        show(quantized, args.reports / "quantizations.html")


def show(found: Any, page: Path) -> None:
    """Print the table of a comparison, and write its report."""
    first, *others = found.report.variants
    rows = [[first.name, figure(first.held_out.auroc), "", figure(first.held_out.ece), ""]]
    for one, difference, shift in zip(others, found.report.differences, found.report.shift, strict=True):
        largest = max(layer.relative_norm.median or 0 for layer in shift.layers)
        minus = figure(difference.held_out.auroc, sign="+")
        rows.append([one.name, figure(one.held_out.auroc), minus, figure(one.held_out.ece), f"{largest:.3f}"])
    print(f"\n{found.name}: probes cross-validated, with 95 % intervals")
    table(["variant", "AUROC", f"AUROC minus {first.name}", "ECE", "largest shift"], rows, 23)
    page.parent.mkdir(parents=True, exist_ok=True)
    reports.save(found, page)
    print(f"Report: {page}")


def figure(found: Any, sign: str = "") -> str:
    """A number with its interval."""
    if found is None or found.value is None:
        return "-"
    interval = "" if found.low is None else f" ({found.low:{sign}.2f} to {found.high:{sign}.2f})"
    return f"{found.value:{sign}.3f}{interval}"


def table(head: list[str], rows: list[list[str]], width: int) -> None:
    """Print rows in columns."""
    for row in [head, *rows]:
        print(f"{row[0]:<12}  " + "  ".join(f"{cell:>{width}}" for cell in row[1:]))


def main() -> None:
    """Train, serve, compare."""
    parser = options(__doc__, checkpoint_needed=False)
    parser.add_argument("--steps", type=int, default=120, help="of the training (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), help="folder of the adapter (%(default)s)")
    parser.add_argument(
        "--reports", type=Path, default=Path("finetuned-reports"), help="folder of the pages (%(default)s)"
    )
    parser.add_argument("--weights", type=Path, help="folder of the base model to train; else the packaged SmolLM2")
    parser.add_argument("--quantizations", nargs="+", default=["none", "8bit", "4bit"], help="of the base (all three)")
    parser.add_argument("--pairs", type=int, help="pairs of countries to probe with, four statements each (37)")
    args = parser.parse_args()
    port = None if args.checkpoint else standin_port()
    with connected(args.url, args.model) as client:
        if port is None:
            compare(client, args.checkpoint, args)
            return
        print(f"Training a LoRA of rank {RANK} for {args.steps} steps …", flush=True)
        train(args.weights, args.steps, saver(args.model, args.output, args.steps))
        print(f"Saved as Tinker saves checkpoints: {args.output}")
        with served(args.output, port) as checkpoint:
            compare(client, checkpoint, args)
            report(client, checkpoint.split("/")[2], args)


if __name__ == "__main__":
    run(main)
