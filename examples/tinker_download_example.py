"""Download a Tinker checkpoint as a folder that PEFT loads whole, in the words of Tinker's own SDK.

Lists what Tinker supports, what the checkpoint's run has and the signed URLs of its files; then the service fetches and
converts it, and PEFT loads both the files as Tinker saves them and the converted folder, to show what each loses.

    TINKER_API_KEY=tml-… .venv/bin/python examples/tinker_download_example.py \\
        --checkpoint tinker://RUN/external_weights/NAME --model Qwen/Qwen3-8B

docs/tinker.md says how to try it without an account, against the stand-in of Tinker.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from common import PATIENCE, connected, load_base, options, run

FILES = ("adapter_model.safetensors", "adapter_config.json")


def show_what_tinker_has(client: Any, checkpoint: str) -> dict[str, str]:
    """Print models, checkpoints and files. Returns the signed URLs of the files."""
    models = client.tinker.supported_models()
    print(f"Tinker supports {len(models)} models:")
    for model in models:
        print(f"  {model.model_name}, context of {model.max_context_length} tokens")
    training_run = checkpoint.removeprefix("tinker://").partition("/")[0]
    print(f"Checkpoints of run {training_run}:")
    for found in client.tinker.checkpoints(training_run):
        print(f"  {found.checkpoint_id}: {found.checkpoint_type}, {found.size_bytes or 0:,} bytes, {found.time}")
    urls: dict[str, str] = client.tinker.archive_url(checkpoint)
    print("Files of the checkpoint, by signed URLs:")
    for name, url in urls.items():
        # Who has the whole URL has the file, until it expires: only the host is for the screen.
        print(f"  {name} at {urlsplit(url).netloc}")
    return urls


def download_raw(urls: dict[str, str], folder: Path) -> None:
    """The files as Tinker has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with (folder / name).open("wb") as file, httpx2.stream("GET", urls[name], timeout=60) as answer:
            answer.raise_for_status()
            for piece in answer.iter_bytes():
                file.write(piece)


def landed(base: Any, folder: Path) -> tuple[int, int]:
    """How many of a folder's tensors PEFT finds a place for on the base, and how many there are."""
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    model = get_peft_model(base, LoraConfig.from_pretrained(str(folder)))
    tensors = load_peft_weights(str(folder), device="cpu")
    # PeftModel.from_pretrained does the same and says nothing of tensors that have no place.
    outcome: Any = set_peft_model_state_dict(model, tensors)
    model.unload()
    return len(tensors) - len(outcome.unexpected_keys), len(tensors)


def main() -> None:
    """List, download, convert, load."""
    parser = options(__doc__)
    parser.add_argument("--output", type=Path, default=Path("downloaded"), help="folder to write (%(default)s)")
    parser.add_argument("--weights", type=Path, help="folder of the base model, to load the adapter on with PEFT")
    args = parser.parse_args()
    with connected(args.url, args.model) as client:
        urls = show_what_tinker_has(client, args.checkpoint)
        print("The service fetches and converts it …", flush=True)
        folder = client.tinker.download_and_convert_weights(
            args.checkpoint, args.model, args.output, timeout=PATIENCE, progress=True
        )
    print(f"PEFT folder: {folder}")
    print(json.dumps(json.loads((args.output / "checkpoint_info.json").read_text()), indent=2))
    if args.weights is None and args.model != "smollm2":
        print("Give --weights FOLDER, the base model in HuggingFace format, to see PEFT load it.")
        return
    base, _ = load_base(args.weights)
    if set(FILES) <= set(urls):
        raw = args.output / "as_tinker_saves_it"
        download_raw(urls, raw)
        print("As Tinker saves it, PEFT applies {} of {} tensors".format(*landed(base, raw)))
    print("Converted, PEFT applies {} of {} tensors".format(*landed(base, folder)))


if __name__ == "__main__":
    run(main)
