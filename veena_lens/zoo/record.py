"""Keeps what a training run really took: steps, pictures, minutes and last loss of each stage, beside the weights."""

import json
import os
import platform
from pathlib import Path

__all__ = ["write_record"]


def write_record(
    work: Path, folder: Path, batches: dict[str, int], seed: int, device: str, threads: int, decoder_from: str = "none"
) -> None:
    """Write `training.json` into the checkpoint folder from the run's log."""
    last: dict[str, dict[str, float]] = {}
    for line in (work / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        last[entry["stage"]] = entry
    stages = [
        {
            "stage": name,
            "steps": int(entry["step"]),
            "pictures": int(entry["step"]) * batches[name],
            "minutes": entry["minutes"],
            "loss": entry["loss"],
        }
        for name, entry in last.items()
    ]
    where = f"{threads} threads on {os.cpu_count()} {platform.machine()} cores" if device == "cpu" else device
    record = {"seed": seed, "where": where, "decoder_from": decoder_from, "stages": stages}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
