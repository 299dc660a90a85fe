"""Edits of hook points for tests, and what every family's are held to: values and edits against its plain model."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families import Case, counted_inputs, hf_model, relative_error
from tests.reference import Reference
from veena_lens.hook_table import hooks_of


def noisy(name: str, value: Tensor) -> Tensor:
    """The value with the same noise at every call, whatever stands at the pads; scales stay positive, and
    attention weights that are zero stay zero (pads are not attended)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    if name.endswith(("hook_scale", "hook_pattern")):
        return value * (1 + 0.2 * noise.tanh())
    if name.endswith("hook_attn_scores"):  # masked scores are astronomically negative
        return value + noise
    return value + 0.1 * noise


def replace_with_noisy(value: Tensor, hook: Any) -> Tensor:
    return noisy(hook.name, value)


def make_noisy_in_place(value: Tensor, hook: Any) -> None:
    value.copy_(noisy(hook.name, value))


def logits_edited(model: Any, inputs: Any, name: str, fn: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(inputs, fwd_hooks=[(name, fn)])


def plain_model(case: Case, edits: Any = None, tracked: bool = False) -> Reference:
    """A pass of the case's plain model that is yet to run."""
    hf = hf_model(case)
    return case.of.plain(hf.config, hf.state_dict(), edits, tracked)


def plain_logits(case: Case, edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
    """Logits of the case's plain model, some values edited where they arise."""
    with torch.no_grad():
        return plain_model(case, edits).forward(**counted_inputs(case))


def plain_values(case: Case) -> dict[str, Tensor]:
    """Every named value of the case's plain model."""
    plain = plain_model(case)
    with torch.no_grad():
        plain.forward(**counted_inputs(case))
    return plain.values


def counted_for_plain(case: Case) -> dict[str, Tensor]:
    return counted_inputs(case)


def position_first(value: Tensor, axes: tuple[str, ...]) -> Tensor:
    """Query positions as the second axis, where a value has them."""
    return value.transpose(1, 2) if "query_pos" in axes else value


def real_places(inputs: Any, name: str, axes: tuple[str, ...], n: int) -> Tensor | None:
    """True at the first two axes' places that exist (None: all): tokens of a row, patches or squares of an image."""
    if axes[0] == "batch":
        return inputs.attention_mask
    if axes[0] == "n_image_tokens" or inputs.crop_grids is None:
        return None
    cells = [h * w for row in inputs.grids for h, w in row]
    if not name.startswith("connector."):
        cells = inputs.crop_grids.prod(-1).tolist()
    return torch.tensor([[i < count for i in range(n)] for count in cells])


def disagreeing(model: Any, inputs: Any, ours: Any, plain: Mapping[str, Tensor]) -> dict[str, float]:
    """Names whose values differ from the plain model's at a place that exists."""
    wrong = {}
    for name in plain:
        axes = hooks_of(model.cfg)[name].axis_names
        mine, theirs = position_first(ours[name], axes), position_first(plain[name], axes)
        keep = real_places(inputs, name, axes, mine.shape[1])
        if name.endswith("attn_scores"):  # masked scores only weigh nothing
            allowed = theirs > -1e30
            if keep is not None:
                assert (mine[keep.bool()][~allowed[keep.bool()]] < -1e30).all()
            mine, theirs = mine.masked_fill(~allowed, 0), theirs.masked_fill(~allowed, 0)
        error = relative_error(mine, theirs, keep)
        if not error < 1e-10:
            wrong[name] = error
    return wrong


def assert_edits_act(
    model: Any, case: Case, edits: Iterable[Callable[..., Any]] = (replace_with_noisy, make_noisy_in_place)
) -> None:
    """An edit of any hook point gives the plain model's logits under the same edit, and changes them; weights stay."""
    raw = counted_inputs(case)
    inputs, keep = model.inputs_from_hf(**raw), raw["attention_mask"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    unedited = plain_logits(case)
    wrong, dead = {}, {}
    for name in hooks_of(model.cfg):
        expected = plain_logits(case, {name: lambda value, name=name: noisy(name, value)})
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


def after_norm(model: Any, cache: Any, layer: int, part: str, value: Tensor) -> Tensor:
    """What becomes of [batch pos ... d_model] in the norm that follows attention ("ln1_post") or MLP, given the run's
    denominator: the value itself where there is none."""
    if not model.cfg.post_norms:
        return value
    scale = cache[f"blocks.{layer}.{part}.hook_scale"]
    return value / scale.view(*scale.shape[:2], *[1] * (value.ndim - 2)) * getattr(model.blocks[layer], part).w
