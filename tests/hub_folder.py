"""A folder of dataset repositories as the hub lays them out: a README with its configurations, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

SUBJECTS = ("astronomy", "college_physics", "philosophy", "virology", "sociology")


def repository(folder: Path, name: str, readme: str, **files: bytes | list[dict[str, Any]]) -> Path:
    """Write one; `files` are rows for a Parquet file, or bytes, by path (`__` for `/`)."""
    root = folder / name
    root.mkdir(parents=True)
    (root / "README.md").write_text(f"---\n{readme}---\n")
    for path, content in files.items():
        target = root / path.replace("__", "/")
        target.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            parquet.write_table(pa.Table.from_pylist(content), f"{target}.parquet")
    return root


def configs(**named: dict[str, str]) -> str:
    """The head of a README: of each configuration the files of each split."""
    found = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in named.items()
    ]
    return f"configs: {json.dumps(found)}\n"


def question(number: int, subject: str) -> dict[str, Any]:
    return {
        "question": f"Question {number} of {subject}?",
        "subject": subject,
        "choices": [f"answer {number + at}" for at in range(4)],
        "answer": number % 4,
    }


def write_hub(folder: Path) -> Path:
    """MMLU, TruthfulQA, GSM8K and others, small and with the columns and splits of the real ones."""
    splits = {name: f"all/{name}-*" for name in ("test", "validation", "dev", "auxiliary_train")}
    repository(
        folder,
        "cais/mmlu",
        configs(all=splits),
        **{
            "all__test-0": [question(at, subject) for subject in SUBJECTS for at in range(20)],
            "all__validation-0": [question(at, "astronomy") for at in range(5)],
            "all__dev-0": [question(at, "astronomy") for at in range(5)],
            "all__auxiliary_train-0": [question(at, "") for at in range(30)],
        },
    )
    choices = {"choices": ["It is.", "It is not.", "Nobody knows."], "labels": [1, 0, 0]}
    repository(
        folder,
        "truthfulqa/truthful_qa",
        configs(multiple_choice={"validation": "multiple_choice/*"}, generation={"validation": "generation/*"}),
        multiple_choice__a=[
            {"question": f"Is it {at}?", "mc1_targets": choices, "mc2_targets": choices} for at in range(9)
        ],
        generation__a=[{"question": "Is it?", "best_answer": "It is."}],
    )
    repository(
        folder,
        "openai/gsm8k",
        configs(main={"train": "main/train-*", "test": "main/test-*"}),
        **{
            "main__train-0": [
                {"question": f"{at} apples?", "answer": f"They are <<1>>.\n#### 1,{at:03}"} for at in range(7)
            ],
            "main__test-0": [{"question": f"{at} pears?", "answer": f"They are.\n#### {at}"} for at in range(6)],
        },
    )
    rows = "".join(
        json.dumps({"sentence": f"sentence {at}", "mood": at % 2, "by": f"w{at // 2}"}) + "\n" for at in range(8)
    )
    repository(folder, "org/moods", configs(plain={"train": "train.jsonl"}), **{"train.jsonl": rows.encode()})
    repository(folder, "org/plain", "license: mit\n", **{"test.csv": b"input,label\none,1\ntwo,0\n"})
    arc = {"text": ["ice", "steam"], "label": ["A", "B"]}
    repository(
        folder,
        "org/arc",
        configs(default={"test": "test*"}),
        test=[{"question": f"What melts {at}?", "choices": arc, "answerKey": "AB"[at % 2]} for at in range(4)],
    )
    repository(folder, "org/outside", configs(default={"test": "/etc/passwd"}), **{"test.txt": b"mine\n"})
    repository(
        folder, "org/pickle", configs(default={"test": "test.pkl"}), **{"test.pkl": b"cos\nsystem\n(S'true'\ntR."}
    )
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["a" * 30_000_000]))
    bomb = repository(folder, "org/bomb", configs(default={"test": "test*"}))
    parquet.write_table(pa.table({"input": texts}), bomb / "test.parquet", compression="zstd")
    return folder
