"""The demo pair and its held-out profiles as files, ready to be served: what a user would find on two machines."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from costeer_vllm.demo.task import held_out

MODELS = Path(__file__).with_name("models")  # the shipped pair: folders "large" and "small", written by demo/train.py


def slug(name: str) -> str:
    """``Martin Keller`` as a file stem and worker name: ``martin-keller``."""
    return "-".join(name.lower().split())


def export(directory: Path | str, num_rows: int = 200, seed: int = 0) -> Path:
    """Write the demo below ``directory``, which is returned; files of an earlier export are overwritten.

    large/, small/     copies of the shipped models
    contexts/*.md      one private context per held-out profile
    queries.jsonl      one row per line: context (path below ``directory``), messages, items, facts; see task.Row
    """
    directory = Path(directory)
    for name in ("large", "small"):
        shutil.copytree(MODELS / name, directory / name, dirs_exist_ok=True)
    (directory / "contexts").mkdir(exist_ok=True)
    with (directory / "queries.jsonl").open("w", encoding="utf-8") as queries:
        for row in held_out(num_rows, seed):
            path = f"contexts/{slug(row.items['name'])}.md"
            (directory / path).write_text(row.context, encoding="utf-8", newline="\n")
            queries.write(json.dumps(asdict(row) | {"context": path}) + "\n")
    return directory
