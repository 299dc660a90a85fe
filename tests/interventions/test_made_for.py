"""Saved edits name their model: on another they are refused unless asked for, and sizes must agree in any case."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cases import BY_NAME, native_model
from veena_lens import HookedVLM
from veena_lens.interventions import Ablate, BoostAttention, Circuit, Steer
from veena_lens.interventions.circuit import FORMAT
from veena_lens.interventions.made_for import MadeFor, same_name


def named(name: str, case: str = "text-llama") -> Any:
    """A tiny model under a name of its own."""
    model = HookedVLM(replace(native_model(BY_NAME[case]).cfg, model_name=name, dtype=None, device=None))
    return model.eval()


@pytest.fixture(scope="module")
def one() -> Any:
    return named("models/one")


@pytest.fixture(scope="module")
def other() -> Any:
    return named("models/other")


def circuit_of(model: Any) -> Circuit:
    return Circuit([Steer(1, torch.ones(model.cfg.d_model), 0.5)], "a vector")


TOKENS = torch.tensor([[1, 5, 6, 7]])


@pytest.mark.parametrize("how", ["given", "applied", "of the circuit"])
def test_a_saved_circuit_acts_on_its_model_alone(how: str, one: Any, other: Any, tmp_path: Path) -> None:
    made = circuit_of(one)
    if how == "of the circuit":
        made = replace(made, made_for=MadeFor.of(one.cfg))
    if how == "applied":
        with one.intervene(made):
            pass
    path = made.save(tmp_path / "c.safetensors", one if how == "given" else None)
    back = Circuit.load(path)
    assert back.made_for is not None and back.made_for.model == "models/one" and back.made_for.n_layers == 2
    with one.intervene(back):
        wanted = one(TOKENS)
    with pytest.raises(ValueError, match="'a vector' was made for 'models/one'; this is 'models/other'.*allow_other"):
        other.intervene(back)
    with pytest.raises(ValueError, match="was made for 'models/one'"):
        other.intervene(per_row=[[], back])
    with other.intervene(back, allow_other_model=True), other.intervene(Circuit.load(path, allow_other_model=True)):
        assert other(TOKENS).shape == wanted.shape


def test_a_part_of_a_circuit_and_a_copy_keep_the_model(one: Any, other: Any) -> None:
    made = Circuit([Ablate("blocks.0.hook_mlp_out"), Ablate("blocks.1.hook_mlp_out")], made_for=MadeFor.of(one.cfg))
    for part in (made[:1], replace(made, name="b")):
        with pytest.raises(ValueError, match="was made for 'models/one'"):
            other.intervene(part)


def test_sizes_must_agree_in_any_case(one: Any) -> None:
    wide = replace(MadeFor.of(one.cfg), d_model=4096, n_layers=32)
    made = Circuit([BoostAttention(layer=1, heads=[0], keys="all")], made_for=wide)
    with pytest.raises(ValueError, match="n_layers 32, not 2, d_model 4096, not"):
        one.intervene(made, allow_other_model=True)


def test_a_file_without_the_model_loads_and_acts_anywhere(one: Any, other: Any, tmp_path: Path) -> None:
    path = circuit_of(one).save(tmp_path / "c.safetensors")
    assert "made_for" not in _words(path)
    for model in (one, other):
        with model.intervene(Circuit.load(path)):
            pass


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [("a/x", "/models/X/", True), ("x", "y", False), ("", "y", True), ("a\\x", "x", True), ("x-7b", "x-13b", False)],
)
def test_names_are_compared_by_their_last_part(first: str, second: str, same: bool) -> None:
    assert same_name(first, second) == same_name(second, first) == same


def _words(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["veena_lens"])


STEER = {"kind": "Steer", "layer": 1, "vector": {"tensor": "0.vector"}, "alpha": 0.5, "positions": "last"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(interventions={}), "field 'interventions' is {}; expected a list of an object"),
        (dict(interventions=[3]), "field 'interventions'"),
        (dict(interventions=[{}]), "unknown intervention"),
        (dict(interventions=[{**STEER, "vector": {"tensor": "lost"}}]), "tensor 'lost' of Steer is missing"),
        (dict(interventions=[{**STEER, "spin": 3}]), "c.safetensors"),
        (dict(interventions=[{**STEER, "layer": "one"}]), "c.safetensors"),
        (dict(interventions=[{**STEER, "alpha": None}]), "c.safetensors"),
        (dict(interventions=[{**STEER, "positions": {"slice": ["a"]}}]), "c.safetensors"),
        (dict(interventions=[{**STEER, "positions": {"Box": [1]}}]), "c.safetensors"),
        (dict(meta=[1]), "field 'meta'"),
        (dict(name=None), "field 'name' is None; expected text"),
        (dict(made_for={"model": 3}), "made_for: the field 'model' is 3"),
        (dict(made_for=["one"]), "field 'made_for'"),
    ],
)
def test_a_changed_circuit_file_is_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    words = {"format": FORMAT, "name": "", "meta": {}, "interventions": [STEER]} | changes
    save_file({"0.vector": torch.ones(8)}, path, metadata={"veena_lens": json.dumps(words)})
    with pytest.raises(ValueError, match=told):
        Circuit.load(path)


def test_a_circuit_with_a_vector_that_is_not_finite_is_refused(one: Any, tmp_path: Path) -> None:
    path = circuit_of(one).save(tmp_path / "c.safetensors")
    about = {"veena_lens": json.dumps(_words(path))}
    tensors = load_file(path)
    tensors["0.vector"][0] = torch.nan
    save_file(tensors, path, metadata=about)
    with pytest.raises(ValueError, match="the tensor 0.vector holds NaN"):
        Circuit.load(path)
