"""Interventions of other packages, written from the protocol alone and registered nowhere, act like our own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, relative_error
from tests.pairs import ready_of
from tests.sweeps.engines import texts_agree
from veena_lens.interventions import Circuit, Intervention, KnockOutAttention, Steer
from veena_lens.interventions.base import MEMBERS, Place
from veena_lens.positions import position_mask

NAME = "three-images-and-none"
SITE = "blocks.1.hook_mlp_out"


@dataclass(frozen=True)
class Negate(Intervention):
    """Turns the sign of what an MLP adds; only what has no default is given."""

    layer: int
    positions: Any

    def site(self, cfg: Any) -> str:
        return f"blocks.{self.layer}.hook_mlp_out"

    def edit(self, activation: Tensor, at: Tensor) -> Tensor:
        return torch.where(at[..., None], -activation, activation)


@dataclass(frozen=True)
class Shift(Intervention):
    """Adds a number to the scores of chosen keys, as a bias that the fused kernel takes."""

    layer: int
    by: float
    positions: Any = "query+generated"
    keys: Any = "image"
    is_bias = True

    def site(self, cfg: Any) -> str:
        return f"blocks.{self.layer}.attn.hook_attn_scores"

    def bias(self, at: Tensor, keys: Tensor, n_heads: int, dtype: torch.dtype) -> Tensor:
        return (at[:, None, :, None] & keys[:, None, None]).to(dtype).expand(-1, n_heads, -1, -1) * self.by


@dataclass(frozen=True)
class Blur(Intervention):
    """Spreads the pattern evenly over chosen keys: an edit that needs them."""

    layer: int
    positions: Any = "query+generated"
    keys: Any = "image"

    def site(self, cfg: Any) -> str:
        return f"blocks.{self.layer}.attn.hook_pattern"

    def edit_at(self, activation: Tensor, place: Place) -> Tensor:
        assert place.keys is not None
        keys = place.keys[:, None, None].to(activation)
        mass = (activation * keys).sum(-1, keepdim=True)
        even = activation * (1 - keys) + mass * keys / keys.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(place.at[:, None, :, None], even, activation)


class Duck:
    """Derives from nothing and has every member."""

    positions, keys, is_bias, changes_nothing, is_whole, caches, likeness = "all", None, False, False, False, (), None

    def site(self, cfg: Any) -> str:
        return SITE

    def edit(self, activation: Tensor, at: Tensor) -> Tensor:
        return torch.where(at[..., None], -activation, activation)

    def edit_at(self, activation: Tensor, place: Place) -> Tensor:
        return self.edit(activation, place.at)

    def fits(self, cfg: Any, inputs: Any, at: Tensor) -> None:
        assert at.shape == inputs.shape

    def bias(self, at: Tensor, keys: Tensor, n_heads: int, dtype: torch.dtype) -> None:
        return None


FOREIGN = {
    "negate": lambda: Negate(1, "query+generated"),
    "shift": lambda: Shift(1, 3.0),
    "blur": lambda: Blur(1),
    "duck": Duck,
}


@pytest.fixture
def ready(model_of: Any) -> tuple[Any, Any]:
    return ready_of(model_of, BY_NAME[NAME])


def negated(at: Tensor) -> Any:
    return lambda tensor, hook: torch.where(at[..., None], -tensor, tensor)


@torch.no_grad()
def test_foreign_edit_equals_a_hook_by_hand(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    with model.hooks([(SITE, negated(position_mask(inputs, "query+generated")))]):
        wanted = model(inputs)
    assert relative_error(model(inputs), wanted) > 1e-6, "the edit acts"
    with model.intervene([Negate(1, "query+generated")]):
        assert torch.equal(model(inputs), wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_edit_acts_alike_in_every_way_of_running(kind: str, ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    item = FOREIGN[kind]()
    assert isinstance(item, Intervention)
    with model.intervene([item]):
        assert model.interventions == (item,) and not model.is_untouched
        wanted = model(inputs)
        cached, cache = model.run_with_cache(inputs)
        assert relative_error(cached, wanted) < 1e-12 and SITE in cache
        heard: list[str] = []
        hooked = model.run_with_hooks(inputs, fwd_hooks=[(SITE, lambda tensor, hook: heard.append(hook.name))])
        assert heard == [SITE] and torch.equal(hooked, wanted)
        with_cache = model.generate(inputs, max_new_tokens=4, return_type="tokens")
        without = model.generate(inputs, max_new_tokens=4, return_type="tokens", use_past_kv_cache=False)
    assert torch.equal(with_cache, without)
    assert model.interventions == () and model.is_untouched
    assert relative_error(model(inputs), wanted) > 1e-6, "the edit acts"
    with model.intervene(per_row=[[item], *[[]] * (len(inputs) - 1)]):
        mixed = model(inputs)
    plain = model(inputs)
    keep = inputs.attention_mask
    assert relative_error(mixed[0][keep[0]], wanted[0][keep[0]]) < 1e-12
    assert relative_error(mixed[1:][keep[1:]], plain[1:][keep[1:]]) < 1e-12
    with model.intervene(Circuit([item])):
        assert torch.equal(model(inputs), wanted)


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_edits_share_a_generation_sweep(kind: str, ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    entries = [[], FOREIGN[kind](), [Steer(0, torch.ones(48)), FOREIGN[kind]()]]
    texts_agree(model, inputs[:1], entries, max_new_tokens=3)


def test_circuit_with_a_foreign_edit_is_not_saved(tmp_path: Path) -> None:
    circuit = Circuit([Steer(0, torch.ones(4)), Negate(1, "last")])
    with pytest.raises(TypeError, match="Negate.*loaded without code"):
        circuit.save(tmp_path / "circuit.safetensors")
    assert not list(tmp_path.iterdir())


def test_object_that_lacks_members_is_refused_with_their_names(ready: tuple[Any, Any]) -> None:
    class Half:
        positions = "last"

        def site(self, cfg: Any) -> str:
            return SITE

    class Placeless(Intervention):
        pass

    model, _ = ready
    with pytest.raises(TypeError, match=r"not an intervention; it lacks keys, edit, .*derives from"):
        model.intervene([Half()])
    with pytest.raises(TypeError, match="it lacks positions"):
        model.intervene([Placeless()])
    with pytest.raises(TypeError, match=r"7 is not an intervention\. Give"):
        model.intervene([7])
    with pytest.raises(TypeError, match="not an intervention"):
        Circuit(["steer"])
    assert set(MEMBERS) >= {"positions", "keys", "site", "edit", "fits", "bias"}


def test_own_kinds_derive_from_the_protocol() -> None:
    from veena_lens.interventions.circuit import KINDS

    assert all(Intervention in kind.__mro__ for kind in KINDS.values())
    knocked = KnockOutAttention(0, queries="last")
    assert knocked.positions == "last" and knocked.is_bias and not knocked.changes_nothing
