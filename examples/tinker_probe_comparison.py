"""Compare a base model with its fine-tuned form, layer by layer: hidden states and what a probe finds in them.

One paired extraction runs the same tokens under the base and under a Tinker checkpoint. A linear probe on each then
tells true statements about capital cities from false ones, and both are printed side by side with the relative change
of the states.

    TINKER_API_KEY=tml-… .venv/bin/python examples/tinker_probe_comparison.py \\
        --checkpoint tinker://RUN/external_weights/NAME --model Qwen/Qwen3-8B --quantization 4bit

docs/tinker.md says how to try it without an account, against the stand-in of Tinker.
"""

from __future__ import annotations

from typing import Any

from common import PATIENCE, auroc, connected, options, run, statements


def value(figure: Any) -> float:
    """The number of a figure, NaN where there is none."""
    return float("nan") if figure is None or figure.value is None else float(figure.value)


def main() -> None:
    """Fetch, extract, probe, print."""
    parser = options(__doc__)
    parser.add_argument("--quantization", default="none", choices=["none", "8bit", "4bit"], help="of the base model")
    parser.add_argument("--layers", default="all", help="all (the default), or every:N")
    parser.add_argument("--pairs", type=int, help="pairs of countries to probe with, four statements each (37)")
    args = parser.parse_args()
    _, texts = statements(args.pairs)
    with connected(args.url, args.model) as client:
        print(f"The service fetches {args.checkpoint} …", flush=True)
        adapter = client.adapters.create(source=args.checkpoint, base_model=args.model).wait(PATIENCE, progress=True)
        if adapter.effect is not None and adapter.effect.is_noop:
            print("Note: this adapter changes nothing; it was saved before its first step.")

        # One tokenisation and one job: row i of either variant is the same text, and the same tokens.
        print(f"{len(texts)} statements through base and fine-tuned …", flush=True)
        states = client.extractions.create(
            model=args.model,
            quantization=args.quantization,
            adapter=["base", adapter.id],
            inputs=[statement.text for statement in texts],
            layers=args.layers,
        ).wait(PATIENCE, progress=True)

        probes = {}
        for variant in ("base", adapter.id):
            print(f"Probes on {variant}, {len(states.layers)} layers …", flush=True)
            probes[variant] = client.probes.create(
                extraction=states.id,
                variant=variant,
                labels=[statement.label for statement in texts],
                groups=[statement.group for statement in texts],  # a country is never on both sides of a split
                C=[0.01],
            ).wait(PATIENCE, progress=True)
    base, tuned = probes.values()

    print(f"\n{args.model}, {args.quantization}: base and {args.checkpoint}")
    print(f"{'layer':>5}  {'relative change':>15}  {'AUROC base':>10}  {'AUROC tuned':>11}")
    change = (states.relative_change or [])[1]  # of the second variant against the first
    for moved, before, after in zip(change, base.report.layers, tuned.report.layers, strict=True):
        shown = float("nan") if moved is None else moved
        print(f"{before.layer:>5}  {shown:>15.4f}  {value(before.auroc):>10.3f}  {value(after.auroc):>11.3f}")
    # The best of many layers flatters; these two come from rows that took no part in choosing the layer.
    print(f"base:       {auroc(base)}")
    print(f"fine-tuned: {auroc(tuned)}")
    for warning in sorted({*base.report.warnings, *tuned.report.warnings}):
        print(f"Note: {warning}")


if __name__ == "__main__":
    run(main)
