"""What the tabs compute: sweeps, steering, neurons, lens and pairs; their copied programs run and agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.app.explorer.conftest import NAME, QUESTION
from veena_lens.app.explorer import directions, lens, look, neurons, pairs, patch, steer
from veena_lens.app.explorer.directions import BEGUN, LISTED, Direction, DirectionSettings, sample_pairs
from veena_lens.app.explorer.own_pairs import OwnPairs
from veena_lens.app.explorer.patch import SweepSettings, TooLarge
from veena_lens.app.explorer.pictures import open_sample, samples
from veena_lens.app.explorer.programs import Made, program
from veena_lens.app.explorer.state import Explorer, Limits, Session
from veena_lens.app.explorer.words import single_token
from veena_lens.emotion import PairSet, extract_directions
from veena_lens.interventions import Circuit, Steer
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import logit_diff


def assert_same_view(made: Any, shown: Any) -> None:
    """The program's view holds the numbers of the one that is shown."""
    assert made.header == shown.header and set(made.arrays) == set(shown.arrays)
    assert all((made.arrays[name] == shown.arrays[name]).all() for name in shown.arrays)
    maps = {bundle.key: bundle.maps.values for bundle in made.bundles}
    common = [bundle for bundle in shown.bundles if maps[bundle.key].shape == bundle.maps.values.shape]
    assert common and all(torch.equal(maps[bundle.key], bundle.maps.values) for bundle in common)


NEUTRAL = next(name for name in samples() if name.startswith("neutral"))


def question(**changed: Any) -> SweepSettings:
    names = patch.pair_names()
    name = next(name for name in names if name.startswith("happy"))
    clean, corrupted = patch.pair_of(name, None, Limits())
    asked = SweepSettings(model=NAME, clean=clean, corrupted=corrupted, prompt=QUESTION, words=("happy", "neutral"))
    return replace(asked, **changed)


# --- Patch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "positions"),
    [("heads", "last"), ("resid", "query"), pytest.param("resid", "each", marks=pytest.mark.slow)],
)
def test_sweep_by_steps_is_the_whole_sweep(explorer: Explorer, session: Session, sites: str, positions: str) -> None:
    asked = question(sites=sites, positions=positions)
    seen = list(patch.sweep(explorer, session, asked))
    assert [s.done for s in seen] == list(range(1, 9)) and bool(seen[3].effects[4:].isnan().all())
    with explorer.using(NAME) as model:
        clean, corrupted = (model.prepare(text=QUESTION, images=i.image) for i in (asked.clean, asked.corrupted))
        metric = logit_diff(*(single_token(model, word) for word in asked.words))
        whole = patch_sweep(model, clean, corrupted, sites, positions, metric, progress=False)
    torch.testing.assert_close(seen[-1].result.values, whole.values, rtol=1e-4, atol=1e-4)
    shown = json.loads(patch.shown_cells(seen[3]))
    assert shown["done"] == 4 and shown["values"][5][0] is None and len(shown["rows"]) == 8


def test_sweep_over_heads_and_positions_shows_heads_and_exports_both(
    explorer: Explorer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = patch.patch_sweep

    def three_positions(*args: Any, **settings: Any) -> Any:
        """As a sweep over each position returns them, from one over the last, which takes seconds."""
        found = whole(*args[:4], "last", *args[5:], **settings)
        if settings.get("plan_only"):
            return found
        values = torch.stack([found.values, 2 * found.values, -found.values], -1)
        labels = {**found.labels, "pos": [3, 4, 5]}
        return replace(found, values=values, axes=("layer", "head", "pos"), labels=labels)

    monkeypatch.setattr(patch, "patch_sweep", three_positions)
    asked = question(sites="heads", positions="each")
    steps = list(patch.run(explorer, session, asked))
    shown, swept = json.loads(steps[-1][0]), session.kept["swept"]
    assert swept.result.axes == ("layer", "head", "pos") and steps[-1][1] == "8 of 8 layers done."
    wanted = swept.result.scores.float().mean(-1)
    torch.testing.assert_close(torch.tensor(shown["values"]), wanted, rtol=0, atol=1e-5)
    assert (shown["columnName"], shown["columns"]) == ("head", [str(h) for h in range(8)])
    assert shown["title"].endswith("by patching each head, mean over positions")
    files = {Path(f).name: f for f in patch.export_sweep(session)}
    assert len(pd.read_csv(files["patching.csv"])) == swept.result.scores.numel()
    assert json.loads(patch.open_head(explorer, session, 3, 5)[0])["open"] == {"layer": 3, "head": 5}


def test_stopped_sweep_leaves_the_model_clean_and_goes_on_where_it_was(
    explorer: Explorer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = question(words=("joyful", "calm"))
    steps = patch.sweep(explorer, session, asked)
    next(steps), next(steps)
    steps.close()  # as when the browser is closed
    assert session.kept["swept"].done == 2
    ran: list[int] = []
    whole = patch.patch_sweep

    def spy(*args: Any, **settings: Any) -> Any:
        if not settings.get("plan_only"):
            ran.append(len(list(settings["out"].rglob("*.safetensors"))))
        return whole(*args, **settings)

    monkeypatch.setattr(patch, "patch_sweep", spy)
    again = list(patch.sweep(explorer, explorer.session("another tab"), asked))
    assert again[-1].done == 8 and ran[1] == ran[0] == ran[2]  # nothing was written for what had been run
    assert ran[3] == ran[0] + 1


def test_sweep_too_large_tells_its_size_and_offers_a_smaller_one(session: Session) -> None:
    small = Explorer([NAME], Limits(sweep_bytes=1_000_000))
    with pytest.raises(TooLarge, match=r"would hold about [\d.]+ (MB|GB) at once; the limit here is 976\.6 KB") as told:
        patch.check(small, question(sites="resid", positions="each"))
    offered = told.value.smaller
    assert offered is not None and (offered.positions, offered.max_rows) == ("last", 8)
    assert patch.check(small, offered)[0].n_rows == 8
    tight = Explorer([NAME], Limits(sweep_bytes=30_000_000))
    with pytest.raises(TooLarge, match="In batches of") as told:
        patch.check(tight, question(sites="resid", positions="each"))
    assert told.value.smaller is not None and told.value.smaller.positions == "each"
    patch.check(tight, told.value.smaller)
    with pytest.raises(TooLarge, match="A single row needs .* use a shorter prompt"):
        patch.check(Explorer([NAME], Limits(sweep_bytes=10)), question())


def test_pair_or_words_that_cannot_be_are_told(explorer: Explorer, session: Session) -> None:
    with pytest.raises(ValueError, match="A pair is two images.*; 1 were given"):
        patch.pair_of("", ["one.png"], Limits())
    with pytest.raises(ValueError, match="Name two words"):
        patch.check(explorer, question(words=("happy", " ")))
    with pytest.raises(ValueError, match="are the same token"):
        patch.check(explorer, question(words=("happy", "happy")))
    with pytest.raises(ValueError, match="Run a sweep first"):
        patch.export_sweep(session)


def test_clicked_cell_opens_its_head_and_exports_are_readable(explorer: Explorer, session: Session) -> None:
    for _ in patch.sweep(explorer, session, question()):
        pass
    value, _code = patch.open_head(explorer, session, 3, 5)
    shown = json.loads(value)
    view = explorer.view(shown["token"])
    assert shown["open"] == {"layer": 3, "head": 5} and view is not None and "difference" in view.header["modes"]
    files = {Path(f).name: f for f in patch.export_sweep(session)}
    assert len(pd.read_csv(files["patching.csv"])) == len(pd.read_parquet(files["patching.parquet"])) == 64
    assert set(files) == {"patching.png", "patching.csv", "patching.parquet", "patching.safetensors"}


def test_code_of_the_patch_tab_runs_and_agrees(explorer: Explorer, session: Session, run_code: Any) -> None:
    asked = question()
    *_, last = patch.sweep(explorer, session, asked)
    _, code = patch.check(explorer, asked)
    made = run_code(code)["result"]
    torch.testing.assert_close(made.scores.float(), last.effects, rtol=1e-3, atol=1e-3)
    assert Path("patching.png").is_file()


# --- Steer and Neurons ------------------------------------------------------------------------------------


def extracted(explorer: Explorer, session: Session, emotion: str, n: int, **changed: Any) -> Direction:
    return directions.extract(explorer, session, DirectionSettings(model=NAME, emotion=emotion, n=n, **changed))


@pytest.mark.parametrize(("reading", "told_apart"), [(BEGUN, True), (LISTED, False)], ids=["begun", "listed"])
def test_direction_is_that_of_extract_directions(
    explorer: Explorer, session: Session, run_code: Any, reading: str, told_apart: bool
) -> None:
    found = extracted(explorer, session, "sad", 3, reading=reading, told_apart=told_apart)
    made = run_code(program(found.made["direction"], found.made["heads"]))
    assert torch.equal(made["direction"].float(), found.vectors) and made["heads"] == found.heads
    assert made["directions"].counts == {"sad": found.n_pairs} and len(made["chosen"]) == found.n_pairs
    lead_in = "the person feels" if reading == BEGUN else None
    assert made["directions"].meta["lead_in"] == lead_in
    filtering = {"max_new_tokens": 16} if told_apart else {"tau": -1, "require_neutral": False}
    with explorer.using(NAME) as model:
        same = extract_directions(model, made["pairs"], lead_in=lead_in, minimum=1, progress=False, **filtering)
    assert torch.equal(same.of("sad").float(), found.vectors)


def test_pairs_that_the_model_does_not_tell_apart_are_left_out_or_told(explorer: Explorer, session: Session) -> None:
    twins = sample_pairs().select(emotion="happy")[:2]
    calm = [
        replace(pair, emotional=replace(pair.neutral, emotion="happy", pair=f"calm {i}"))
        for i, pair in enumerate(twins)
    ]
    mixed = PairSet((*calm, *twins))
    session.kept["own_pairs"] = OwnPairs(pairs=mixed, folder=session.folder / "none", code="pairs")
    asked = {"n": 4, "own": mixed.fingerprint}
    assert extracted(explorer, session, "happy", **asked).n_pairs == 2
    assert extracted(explorer, session, "happy", told_apart=False, **asked).n_pairs == 4
    with pytest.raises(ValueError, match=r"answers none of 2 pairs correctly: its answer must name happy"):
        extracted(explorer, session, "happy", n=2, own=mixed.fingerprint)
    with pytest.raises(ValueError, match="Your pairs were replaced or removed"):
        extracted(explorer, session, "happy", n=2, own="another")


def test_alpha_turns_neutral_faces_and_neutral_strengths_change_nothing(explorer: Explorer, session: Session) -> None:
    direction = extracted(explorer, session, "happy", 6)
    shown = open_sample(NEUTRAL)
    found = steer.steer(explorer, session, NAME, steer.circuit_from(direction, 4, 1.5, 1, 1), shown, QUESTION, "happy")
    assert found.rate_after > found.rate_before and found.is_hit(found.after) and not found.is_hit(found.before)
    nothing = steer.circuit_from(direction, 4, 0, 1, 1)
    same = steer.steer(explorer, session, NAME, nothing, shown, QUESTION, "happy")
    assert len(nothing.value) == 0 and same.after == same.before


def test_circuit_names_heads_and_neurons_layer_by_layer(explorer: Explorer, session: Session) -> None:
    direction = extracted(explorer, session, "sad", 4)
    circuit = steer.circuit_from(direction, 3, 1.0, 2.0, 1.5).value
    kinds = [type(item).__name__ for item in circuit]
    assert kinds.count("Steer") == 1 and "BoostAttention" in kinds and "ScaleNeurons" in kinds
    boosted = [(i.layer, h) for i in circuit if type(i).__name__ == "BoostAttention" for h in i.heads]
    assert sorted(boosted) == sorted((la, h) for la, h, _ in direction.heads)
    with pytest.raises(ValueError, match="No layer 8; the direction has layers 0 to 7"):
        steer.circuit_from(direction, 8, 1.0, 1, 1)
    with pytest.raises(ValueError, match="There are no pairs of 'bored'; choose one of happy"):
        extracted(explorer, session, "bored", 4)


def test_circuit_that_was_exported_loads_and_takes_new_strengths(
    explorer: Explorer, session: Session, tmp_path: Path
) -> None:
    direction = extracted(explorer, session, "happy", 4)
    circuit = steer.circuit_from(direction, 4, 1.5, 2.0, 1)
    shown = open_sample(NEUTRAL)
    first = steer.steer(explorer, session, NAME, circuit, shown, QUESTION, "happy")
    files = {Path(f).name: f for f in steer.export_steering(session)}
    loaded = steer.load_circuit(session, files["circuit.safetensors"])
    again = steer.steer(
        explorer, session, NAME, steer.loaded_at(loaded, 1.5, 2.0, 1.0), shown, QUESTION, loaded.meta["emotion"]
    )
    assert again.after == first.after and list(pd.read_csv(files["steering.csv"])["hit"]) == [False, True]
    off = steer.loaded_at(loaded, 0.0, 1.0, 1.0)
    steers = [item for item in off.value if isinstance(item, Steer)]
    assert steers[0].alpha == 0 and steer.steer(
        explorer, session, NAME, off, shown, QUESTION, "happy"
    ).after == first.before  # fmt: skip
    data = Path(files["circuit.safetensors"]).read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"^cut\.safetensors \([\d,]+ bytes\) cannot be read as a circuit.*cut short"):
        steer.load_circuit(session, cut)


def test_circuit_of_another_model_is_refused_and_nothing_stays(explorer: Explorer, session: Session) -> None:
    alien = Made(Circuit([Steer(layer=2, vector=torch.ones(7))]), "alien")
    with pytest.raises(ValueError, match="the vector has 7 entries; the model's d_model is 192"):
        steer.steer(explorer, session, NAME, alien, open_sample(NEUTRAL), QUESTION, "happy")


def test_direction_that_was_found_is_a_mode_of_the_next_look(
    explorer: Explorer, session: Session, face: Any, run_code: Any
) -> None:
    direction = extracted(explorer, session, "happy", 4)
    for _ in look.ask(explorer, session, NAME, [face], QUESTION, 4):
        pass
    view, code = look.look(explorer, session)
    assert "push" in view.header["modes"] and view.header["directions"] == ["happy"]
    made = run_code(code)
    assert torch.equal(made["direction"].float(), direction.vectors)
    assert_same_view(made["view"], view)


def test_code_of_the_steer_tab_runs_and_says_the_same(
    explorer: Explorer, session: Session, run_code: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    direction = extracted(explorer, session, "happy", 4)
    circuit = steer.circuit_from(direction, 4, 1.5, 1.5, 1.2)
    shown = open_sample(NEUTRAL)
    found = steer.steer(explorer, session, NAME, circuit, shown, QUESTION, "happy")
    made = run_code(found.code)
    assert (made["before"], made["after"]) == (found.before, found.after)
    assert (made["rate_before"], made["rate_after"]) == (found.rate_before, found.rate_after)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(made["circuit"][:1], circuit.value[:1], strict=True))
    assert found.before in capsys.readouterr().out and Path("circuit.safetensors").is_file()
    loaded = steer.loaded_at(steer.load_circuit(session, "circuit.safetensors"), 1.5, 1.5, 1.2)
    again = steer.steer(explorer, session, NAME, loaded, shown, QUESTION, "happy")
    assert again.after == found.after == run_code(again.code)["after"]


def test_neurons_are_ranked_named_and_shown(explorer: Explorer, session: Session, run_code: Any) -> None:
    with pytest.raises(ValueError, match="Extract a direction"):
        neurons.export_neurons(session)
    direction = extracted(explorer, session, "happy", 8)
    table = neurons.strongest(direction)
    assert (
        len(table) == 30
        and table["projection"].is_monotonic_decreasing
        and set(table["activity"]) == {"higher", "lower"}
    )
    layer, neuron = (int(table.iloc[0][c]) for c in ("layer", "neuron"))
    tokens, pictures, code = neurons.look_at_neuron(explorer, direction, layer, neuron)
    assert len(tokens) == 12 and list(tokens["by"]) == sorted(tokens["by"], reverse=True)
    captions = [caption for _, caption in pictures]
    values = [float(caption.split(": ")[1].split(" ")[0]) for caption in captions]
    assert 1 <= len(pictures) <= 6 and values == sorted(values, reverse=True)
    made = run_code(code)
    assert made["neurons"] == direction.neurons and made["tokens"].equals(tokens)
    assert [caption for _, caption in made["images"]] == captions
    assert len(neurons.export_neurons(session)) == 2


# --- Lens and Pairs ---------------------------------------------------------------------------------------


def test_lens_reads_where_a_word_is_nearest(explorer: Explorer, session: Session, face: Any, run_code: Any) -> None:
    with pytest.raises(ValueError, match="Ask something in the Look tab first"):
        lens.look_through(explorer, session, ["happy"])
    for _ in look.ask(explorer, session, NAME, [face], QUESTION, 8):
        pass
    view, scores, code = lens.look_through(explorer, session, ["happy", "sad"])
    assert scores.meta["after"] == "feels" and float(scores.values[-1, 0]) > 0.5 > float(scores.values[-1, 1])
    assert view.header["modes"] == ["lens", "norms"] and view.header["lens"]["words"] == [" happy", " sad"]
    made = run_code(code)
    assert torch.equal(made["scores"].values, scores.values) and made["scores"].meta == scores.meta
    assert_same_view(made["view"], view)
    assert Path("lens.png").is_file() and Path("lens.html").is_file()
    explorer.show(session, "lens", view)
    assert {Path(f).name for f in lens.export_lens(session)} == {
        "lens.png", "lens.csv", "lens.parquet", "lens.html"
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", " , ", ",".join("abcdefghijklmnop")])
def test_words_of_the_lens_are_between_one_and_twelve(text: str) -> None:
    with pytest.raises(ValueError, match="name 1 to 12 words"):
        lens.words_in(text)


def test_pairs_are_asked_and_their_code_runs(
    explorer: Explorer, session: Session, run_code: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    table, code = pairs.answered(explorer, session, NAME, "happy")
    assert len(table) == pairs.MOST_PAIRS and set(table["pair"]) <= set(patch.pair_names())
    assert (table["names happy"] == "yes").mean() > 0.5 and len(set(table.columns)) == 5
    assert run_code(code)["table"].equals(table)
    assert table["answer to the emotional image"][0] in capsys.readouterr().out
    assert len(pd.read_parquet(pairs.export_pairs(session)[1])) == pairs.MOST_PAIRS
