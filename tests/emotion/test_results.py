"""results.json: strict JSON with every stage in it, and the table of the README made from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emotion.small_run import small_run
from veena_lens.emotion.results import FORMAT, _clean, main_table, part_table, results_of, save_results


def row(condition: str, method: str, hit: float, p: float | None = None, false: float | None = 0.25) -> dict[str, Any]:
    return {"condition": condition, "method": method, "hit": hit, "low": 0.1, "high": 0.956, "p": p, "false": false}


TABLE = {
    "test": {
        "table": [
            row("alone", "plain", 0.5), row("alone", "VEE", 0.75, 0.2, 0.0), row("conflict", "plain", 0.125),
            row("conflict", "VEE", 1.0, 0.049),
        ]
    }
}  # fmt: skip


def test_main_table_has_a_row_a_method_a_column_a_condition_and_stars_where_p_is_small() -> None:
    assert main_table(TABLE).splitlines() == [
        "| method | alone | conflict | false emotion |",
        "|---|---|---|---|",
        "| plain | 50.0 [10, 96] | 12.5 [10, 96] | 25.0 |",
        "| VEE | 75.0 [10, 96] | 100.0* [10, 96] | 0.0 |",
    ]
    assert len(main_table(TABLE, ["VEE"]).splitlines()) == 3


def test_an_unknown_share_of_false_emotions_is_left_blank() -> None:
    one = {"test": {"table": [row("alone", "plain", 0.5, None, None)]}}
    assert main_table(one).splitlines()[-1] == "| plain | 50.0 [10, 96] |  |"


def test_what_json_lacks_becomes_null_and_numbers_become_pythons() -> None:
    import numpy as np

    dirty = {1: [math.nan, np.float64(0.5), np.int64(3)], "b": (torch.tensor(2.0), math.inf, "x", None, True)}
    assert _clean(dirty) == {"1": [None, 0.5, 3], "b": [2.0, None, "x", None, True]}


def test_results_of_a_run_are_strict_json_and_hold_every_stage() -> None:
    run, _ = small_run()
    found = results_of(run)
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found and found["format"] == FORMAT
    for name in ("directions", "key_layers", "stages", "key_heads", "key_neurons", "ways", "tuned", "test", "random",
                 "elsewhere", "doses", "side_effects", "seconds", "identities"):  # fmt: skip
        assert found[name], f"{name} is empty"
    hits = {(r["condition"], r["method"]): r["hit"] for r in found["test"]["table"]}
    assert hits["alone", "VEE"] == pytest.approx(float(run.test.hits["alone"]["VEE"].mean()))
    assert found["settings"]["max_new_tokens"] == 6 and found["ways"]["winner"] == list(run.head_rankings.winner)
    table = main_table(found).splitlines()
    assert len(table) == 2 + len(run.test.methods) and table[2].startswith("| plain | ")


def test_saving_replaces_the_file_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    assert save_results(small_run()[0], path) == path
    assert json.loads(path.read_text())["model"] == "tiny-llava-emotion" and [p.name for p in tmp_path.iterdir()] == [
        "results.json"
    ]


def test_the_summary_puts_controls_and_price_beside_the_method() -> None:
    found = results_of(small_run()[0])
    rows = [line[2:-2].split(" | ") for line in part_table(found, "summary").splitlines()[2:]]
    named = [row[0] for row in rows]
    assert named[:3] == ["plain model", "VEE", "random heads of the same layers"] and "VEENA" in named
    drawn = next(r for r in found["random"]["table"] if r["method"] == "VEE" and r["condition"] == "conflict, plain")
    assert rows[2][1].startswith(f"{100 * drawn['random']:.1f} [")
    right = {r["method"]: r["attributes"] for r in found["side_effects"]}
    assert rows[1][3] == ("" if right["VEE"] is None else f"{100 * right['VEE']:.1f}")


def test_the_best_baseline_of_the_summary_is_one_whose_trials_passed_the_guards() -> None:
    kept = Path(__file__).parents[2] / "docs" / "results" / "tiny-llava-emotion.json"
    table = part_table(json.loads(kept.read_text()), "summary")
    assert "| vcd, the best baseline | 84.4 [80, 89] |" in table and "spin" not in table
