"""What every family's hook points are held to: values and edits against its plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.cases import relative_error
from tests.model.noise import logits_edited, make_noisy_in_place, noisy, replace_with_noisy
from veena_lens.hook_table import hooks_of


def position_first(value: Tensor, axes: tuple[str, ...]) -> Tensor:
    """Query positions as the second axis, where a value has them."""
    return value.transpose(1, 2) if "query_pos" in axes else value


def disagreeing(
    ours: Any,
    plain: Mapping[str, Tensor],
    names: Iterable[str],
    model: Any,
    real: Callable[[str, tuple[str, ...], int], Tensor | None],
) -> dict[str, float]:
    """Names whose values differ at a place that exists; `real` tells the first two axes' such places (None: all)."""
    wrong = {}
    for name in names:
        axes = hooks_of(model.cfg)[name].axis_names
        mine, theirs = position_first(ours[name], axes), position_first(plain[name], axes)
        keep = real(name, axes, mine.shape[1])
        if name.endswith("attn_scores"):  # masked scores only weigh nothing
            allowed = theirs > -1e30
            if keep is not None:
                assert (mine[keep.bool()][~allowed[keep.bool()]] < -1e30).all()
            mine, theirs = mine.masked_fill(~allowed, 0), theirs.masked_fill(~allowed, 0)
        error = relative_error(mine, theirs, keep)
        if not error < 1e-10:
            wrong[name] = error
    return wrong


def tokens_of(inputs: Any) -> Callable[[str, tuple[str, ...], int], Tensor | None]:
    """`real` of models whose images are whole: pads of the text alone do not exist."""
    return lambda name, axes, n: inputs.attention_mask if axes[0] == "batch" else None


def assert_edits_act(
    model: Any,
    raw: Mapping[str, Tensor],
    plain_logits: Callable[..., Tensor],
    edits: Iterable[Callable[..., Any]] = (replace_with_noisy, make_noisy_in_place),
) -> None:
    """An edit of any hook point gives the plain model's logits under the same edit, and changes them; weights stay.

    `plain_logits(edits)`: the plain model's, with {name: function}."""
    inputs, keep = model.inputs_from_hf(**raw), raw["attention_mask"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    unedited = plain_logits({})
    wrong, dead = {}, {}
    for name in hooks_of(model.cfg):
        expected = plain_logits({name: lambda value, name=name: noisy(name, value)})
        for edit in edits:
            ours = logits_edited(model, inputs, name, edit)
            error, effect = relative_error(ours, expected, keep), relative_error(ours, unedited, keep)
            if not error < 1e-10:
                wrong[name, edit.__name__] = error
            if not effect > 1e-6:
                dead[name, edit.__name__] = effect
    assert wrong == {} and dead == {}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), f"an edit wrote into the weight {name}"
    with torch.no_grad():
        assert relative_error(model(inputs), unedited, keep) < 1e-10, "an edit outlived its run"
