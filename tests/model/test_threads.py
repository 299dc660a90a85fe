"""Threads that use one model: a block's edits and hooks are its thread's alone, and copies begin without any."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, counted, raw_inputs
from veena_lens.interventions import BoostAttention, KnockOutAttention, Steer
from veena_lens.sweeps import patch_sweep

SITE = "blocks.0.hook_resid_post"
PATTERN = "blocks.1.attn.hook_pattern"


@pytest.fixture
def ready(model_of: Any) -> tuple[Any, Any]:
    model = model_of(BY_NAME["three-images-and-none"], casts="none")
    return model, model.inputs_from_hf(**counted(raw_inputs(BY_NAME["three-images-and-none"])))


def steers() -> list[Any]:
    boost = BoostAttention(1, factor=4.0, mode="mul")
    return [Steer(0, torch.ones(48), alpha=3.0, positions="all"), boost, KnockOutAttention(0)]


def negated(x: Tensor, hook: Any) -> Tensor:
    return -x


def ways(model: Any, inputs: Any) -> dict[str, Callable[[], Any]]:
    """Ways of running, each with a result to compare."""

    def steered() -> Tensor:
        with model.intervene(steers()):
            return model(inputs)

    def hooked() -> Tensor:
        with model.hooks([(SITE, negated), (PATTERN, negated)]):
            return model(inputs)

    def swept() -> Tensor:
        one = inputs[:1]
        with torch.no_grad():
            return patch_sweep(model, one, one, metric=lambda logits: logits[:, 7], progress=False).values

    def with_gradients() -> Tensor:
        with torch.enable_grad():
            _, cache = model.run_with_cache(inputs, return_type="loss", names_filter=SITE, incl_bwd=True)
        return cache[f"{SITE}_grad"]

    return {
        "forward": lambda: model(inputs),
        "generate": lambda: model.generate(inputs, max_new_tokens=3, return_type="tokens", eos_token_id=[]),
        "a cache": lambda: model.run_with_cache(inputs)[1]["pattern", 1],
        "hooks": lambda: model.run_with_hooks(inputs, fwd_hooks=[(SITE, negated)]),
        "a block of hooks": hooked,
        "interventions": steered,
        "attention": lambda: model.attention(inputs[[0, 2]]).values,
        "a sweep": swept,
        "gradients": with_gradients,
    }


@torch.no_grad()
def test_ways_of_running_do_not_meet_in_other_threads(ready: tuple[Any, Any]) -> None:
    runs = ways(*ready)
    wanted = {name: run() for name, run in runs.items()}

    def many(name: str) -> list[str]:
        with torch.no_grad():
            return [name for _ in range(4) if not torch.equal(runs[name](), wanted[name])]

    with ThreadPoolExecutor(len(runs)) as pool:
        assert sum(pool.map(many, list(runs) * 2), []) == []
    assert ready[0].is_untouched and ready[0].context_level == 0


@torch.no_grad()
def test_open_block_acts_in_its_own_thread_alone(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    runs = ways(model, inputs)
    wanted = {name: run() for name, run in runs.items() if name != "gradients"}
    for block in (lambda: model.intervene(steers()), lambda: model.hooks([(SITE, negated), (PATTERN, negated)])):
        with block():
            mine = model(inputs)
            with ThreadPoolExecutor(1) as pool:
                found = {name: pool.submit(torch.no_grad()(runs[name])).result(60) for name in wanted}
                assert pool.submit(lambda: model.interventions == () and model.is_untouched).result()
                pool.submit(model.reset_hooks).result()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert torch.equal(model(inputs), mine) and not torch.equal(mine, wanted["forward"])
    assert model.is_untouched


def test_hooks_added_without_a_block_are_the_models(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    with torch.no_grad():
        wanted = model.run_with_hooks(inputs, fwd_hooks=[(SITE, negated)])
        model.add_hook(SITE, negated)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(torch.no_grad()(model), inputs).result(), wanted)
        model.reset_hooks()
        with model.hooks([(SITE, negated)], reset_hooks_end=False):
            pass
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(torch.no_grad()(model), inputs).result(), wanted)
        model.reset_hooks()


def test_no_other_thread_runs_beside_an_open_block_of_backward_hooks(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    with ThreadPoolExecutor(1) as pool:
        with model.hooks(bwd_hooks=[(SITE, lambda grad, hook: None)]):
            model(inputs, return_type="loss").backward()
            with pytest.raises(RuntimeError, match=r"'MainThread' is in a block with backward hooks.*deepcopy"):
                pool.submit(model, inputs).result(60)
        assert torch.equal(pool.submit(model, inputs).result(60), model(inputs))


def test_thread_waits_for_the_pass_of_another(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    inside, leave, order = threading.Event(), threading.Event(), []

    def slow(x: Tensor, hook: Any) -> None:
        order.append("begins")
        inside.set()
        leave.wait(30)
        order.append("ends")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(model.run_with_hooks, inputs, fwd_hooks=[(SITE, slow)])
        assert inside.wait(30)
        second = pool.submit(lambda: (model(inputs), order.append("next")))
        leave.set()
        for run in (first, second):
            run.result(30)
    assert order == ["begins", "ends", "next"]


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_has_no_edits_and_the_original_keeps_them(how: str, ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    plain = model(inputs)
    if how == "pickle":
        assert torch.equal(pickle.loads(pickle.dumps(model))(inputs), plain)
        return
    model.add_hook("blocks.1.hook_resid_post", negated)  # belongs to the model, so to its copy
    kept = model(inputs)
    with model.intervene(steers()), model.hooks([(SITE, negated), (PATTERN, negated)]), model.record_attention():
        wanted = model(inputs)
        twin = copy.deepcopy(model)
        assert twin.interventions == () and torch.equal(twin(inputs), kept)
        assert not twin.hook_dict[SITE]._forward_hooks and not twin.hook_dict[SITE].fwd_hooks
        assert torch.equal(model(inputs), wanted) and not torch.equal(wanted, kept)
    with twin.intervene(steers()):
        assert not torch.equal(twin(inputs), kept)
    assert torch.equal(model(inputs), kept)
    twin.reset_hooks()
    assert torch.equal(twin(inputs), plain) and torch.equal(model(inputs), kept)
    model.reset_hooks()
