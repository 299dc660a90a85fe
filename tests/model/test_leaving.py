"""Whatever is raised, and wherever, the model is afterwards as it was before: nothing has to be reset by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, counted, raw_inputs
from veena_lens.interventions import BoostAttention, Intervention, Steer

SITE = "blocks.1.hook_resid_post"


class Stop(Exception):
    pass


@dataclass(frozen=True)
class Failing(Intervention):
    error: type[BaseException]
    when: str
    positions: Any = "last+generated"

    def site(self, cfg: Any) -> str:
        if self.when == "site":
            raise self.error
        return SITE

    def fits(self, cfg: Any, inputs: Any, at: Tensor) -> None:
        if self.when == "fits":
            raise self.error

    def edit(self, activation: Tensor, at: Tensor) -> Tensor:
        if self.when == "edit":
            raise self.error
        return activation


@pytest.fixture
def ready(model_of: Any) -> tuple[Any, Any]:
    model = model_of(BY_NAME["three-images-and-none"], casts="none")
    return model, model.inputs_from_hf(**counted(raw_inputs(BY_NAME["three-images-and-none"])))


def raising(error: type[BaseException]) -> Any:
    def hook(tensor: Tensor, hook: Any) -> None:
        raise error

    return hook


def moments(model: Any, inputs: Any, error: type[BaseException]) -> Iterator[tuple[str, Any]]:
    """What raises, by name."""
    steer = [Steer(0, torch.ones(48)), BoostAttention(1)]
    late: list[int] = []

    def at_the_third_step(ids: Tensor, scores: Tensor) -> Tensor:
        late.append(1)
        if len(late) == 3:
            raise error
        return scores

    yield "a hook", lambda: model.run_with_hooks(inputs, fwd_hooks=[(SITE, raising(error))])
    yield "a hook of a cached run", lambda: cached(model, inputs, raising(error))
    yield "a hook of generate", lambda: hooked(model, inputs, raising(error))
    for when in ("site", "fits", "edit"):
        yield when, lambda when=when: edited(model, inputs, [*steer, Failing(error, when)])
        yield f"{when} per row", lambda when=when: per_row(model, inputs, Failing(error, when))
        yield f"{when} in generate", lambda when=when: generated(model, inputs, [*steer, Failing(error, when)])
    yield "a logits processor", lambda: generated(model, inputs, steer, logits_processor=[at_the_third_step])
    yield "the block itself", lambda: in_the_block(model, error)
    yield "a recorded run", lambda: recorded(model, inputs, raising(error))


def cached(model: Any, inputs: Any, hook: Any) -> None:
    with model.hooks([(SITE, hook)]):
        model.run_with_cache(inputs)


def hooked(model: Any, inputs: Any, hook: Any) -> None:
    with model.hooks([(SITE, hook)]):
        model.generate(inputs, max_new_tokens=2, return_type="tokens")


def edited(model: Any, inputs: Any, interventions: list[Any]) -> None:
    with model.intervene(interventions):
        model(inputs)


def per_row(model: Any, inputs: Any, item: Any) -> None:
    with model.intervene(per_row=[[item], *[[]] * (len(inputs) - 1)]):
        model(inputs)


def generated(model: Any, inputs: Any, interventions: list[Any], **settings: Any) -> None:
    with model.intervene(interventions):
        model.generate(inputs, max_new_tokens=4, return_type="tokens", **settings)


def in_the_block(model: Any, error: type[BaseException]) -> None:
    with model.intervene([Steer(0, torch.ones(48))]), model.without_interventions(), model.record_attention():
        raise error


def recorded(model: Any, inputs: Any, hook: Any) -> None:
    with model.record_attention("last"), model.hooks([(SITE, hook)]):
        model(inputs)


@torch.no_grad()
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, GeneratorExit])
def test_nothing_is_left_after_an_error_at_any_moment(error: type[BaseException], ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    plain = model(inputs)
    for name, run in moments(model, inputs, error):
        with pytest.raises(error):
            run()
        assert model.is_untouched and model.interventions == () and model._edits._frames == [], name
        assert torch.equal(model(inputs), plain), name


@torch.no_grad()
def test_error_inside_leaves_the_outer_block_in_force(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    with model.intervene([Steer(0, torch.ones(48))]):
        wanted = model(inputs)
        for name, run in moments(model, inputs, Stop):
            with pytest.raises(Stop):
                run()
            assert torch.equal(model(inputs), wanted), name
    assert model.is_untouched


@torch.no_grad()
def test_block_that_a_dropped_generator_leaves_late_takes_only_its_own_with_it(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    plain = model(inputs)

    def steps(alpha: float) -> Iterator[int]:
        with model.intervene([Steer(0, torch.ones(48), alpha=alpha)]):
            yield 1

    with model.intervene([Steer(0, torch.ones(48), alpha=2.0)]):
        wanted = model(inputs)
    first = steps(5.0)
    next(first)
    with model.intervene([Steer(0, torch.ones(48), alpha=2.0)]):
        first.close()  # leaves after the inner block was entered
        assert [item.alpha for item in model.interventions] == [2.0]
        assert torch.equal(model(inputs), wanted)
    assert model.is_untouched and torch.equal(model(inputs), plain)
