"""Contrastive decoding: equal to a plain loop without a cache, row by row, and nothing where it is off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.circuits.tiny import ready as tiny
from tests.emotion.asked import NAMES, bundled, examples
from veena_lens.emotion.enhance.baselines import pai
from veena_lens.emotion.enhance.contrastive_decoding import contrasted, guided, vcd, with_noise, without_pictures
from veena_lens.emotion.methods import PLAIN, Method, generate_answers, prepared

PICTURED = ("clip-llama", "right-padding", "window-mistral", "qwen3_vl-plain", "qwen3_vl-deepstack-every-decoder-layer")


def inputs_of(model_of: Any, name: str) -> tuple[Any, Any]:
    """(model, those rows of a case's inputs that have an image)."""
    model, inputs = tiny(model_of, name)
    return model, inputs[[row for row, n in enumerate(inputs.n_images) if n]]


def plain_loop(
    model: Any, inputs: Any, other: Any, combine: Callable[[Tensor, Tensor], Tensor], edits: Any = (), steps: int = 6
) -> Tensor:
    """Greedy tokens of whole forwards of both streams; only the first is edited."""
    new = torch.zeros(len(inputs), 0, dtype=torch.long)
    for _ in range(steps):
        with torch.no_grad():
            longer, blind = (x.left_padded().with_new_tokens(new) if new.shape[1] else x for x in (inputs, other))
            with model.intervene(list(edits)):
                own = last_of(model, longer)
            new = torch.cat([new, combine(own, last_of(model, blind)).argmax(-1)[:, None]], 1)
    return new


def last_of(model: Any, inputs: Any) -> Tensor:
    return model(inputs.left_padded())[:, -1].float()


def by_rule(model: Any, inputs: Any, method: Method, steps: int = 6) -> Tensor:
    rules = list(method.decoding(model, inputs)) if method.decoding else []
    with method.applied(model, inputs):
        return model.generate(
            inputs, max_new_tokens=steps, eos_token_id=[], return_type="tokens", logits_processor=rules
        )


def test_the_formulas_by_hand() -> None:
    own, other = torch.tensor([[2.0, 1.5, 1.0, -3.0]]), torch.tensor([[2.0, 0.0, 3.0, -9.0]])
    # log 0.3 is -1.2: what lies more than that below the best is out, whatever the contrast says of it.
    assert contrasted(own, other, 1.0, 0.3).tolist() == [[2.0, 3.0, -1.0, -math.inf]]
    assert contrasted(own, other, 0.0, 1.0).tolist() == [[2.0, -math.inf, -math.inf, -math.inf]]
    lp, blind = own.log_softmax(-1)[0], other.log_softmax(-1)[0]
    found = guided(own, other, 1.5, 0.3)[0]
    torch.testing.assert_close(found[:3], 1.5 * lp[:3] - 0.5 * blind[:3])
    assert found[3] == -math.inf
    torch.testing.assert_close(guided(own, other, 1.0, 1e-9)[0], lp)


@pytest.mark.parametrize("name", PICTURED)
def test_vcd_equals_a_plain_loop_without_a_cache(name: str, model_of) -> None:
    model, inputs = inputs_of(model_of, name)
    found = by_rule(model, inputs, vcd(a=2.0, b=0.01, noise_step=800, seed=3))
    other = with_noise(model, inputs, 800, 3)
    expected = plain_loop(model, inputs, other, lambda own, other: contrasted(own, other, 2.0, 0.01))
    assert torch.equal(found, expected)
    assert not torch.equal(found, by_rule(model, inputs, PLAIN)), "the rule changed no token, so the test shows nothing"


@pytest.mark.parametrize("name", PICTURED)
def test_guidance_equals_a_plain_loop_whose_second_stream_is_not_edited(name: str, model_of) -> None:
    model, inputs = inputs_of(model_of, name)
    method = pai(2.0, [0, 1], cfg_gamma=3.0)
    found = by_rule(model, inputs, method)
    blind = without_pictures(model, inputs)

    def combine(own: Tensor, other: Tensor) -> Tensor:
        return guided(own, other, 3.0)

    assert torch.equal(found, plain_loop(model, inputs, blind, combine, method.interventions))
    assert not torch.equal(found, by_rule(model, inputs, pai(2.0, [0, 1]))), "guidance changed no token"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [vcd(1.0, 0.1, 800), pai(0.5, range(1, 8), 1.5)], ids=lambda m: m.name)
def test_a_batch_with_pads_and_early_ends_equals_its_rows_alone(name: str, method: Method) -> None:
    model = bundled(name)
    together = generate_answers(model, examples(), method, batch_size=3, max_new_tokens=12)
    assert together == generate_answers(model, examples(), method, batch_size=1, max_new_tokens=12)
    inputs = prepared(model, examples())
    assert not bool(inputs.attention_mask.all()), "no row is padded, so the test shows less"


def test_a_row_that_has_ended_does_not_change_the_others(model_of) -> None:
    """The end token is one that some row says early and another never."""
    model, inputs = inputs_of(model_of, "clip-llama")
    method = vcd(a=2.0, b=0.01, noise_step=800)
    free = by_rule(model, inputs, method, steps=10)
    row, end = next(
        (row, int(t)) for row in range(len(free)) for t in free[row] if not bool((free[1 - row] == t).any())
    )
    settings = dict(max_new_tokens=10, eos_token_id=[end], return_type="tokens")
    ended = model.generate(inputs, logits_processor=list(method.decoding(model, inputs)), **settings)  # type: ignore[misc]
    other = 1 - row
    assert torch.equal(ended[other], free[other])
    assert int((ended[row] == end).nonzero()[0]) < 9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [vcd(a=0.0), pai(0.0, [0], cfg_gamma=1.0), pai(0.0, [3])], ids=repr)
def test_settings_that_are_off_leave_the_answers(name: str, method: Method) -> None:
    model = bundled(name)
    assert generate_answers(model, examples(), method, batch_size=3) == generate_answers(
        model, examples(), batch_size=3
    )


def test_contrast_with_the_same_picture_leaves_greedy_tokens(model_of) -> None:
    """(1 + a) l - a l = l: with next to no noise nothing changes, second stream and all."""
    model, inputs = inputs_of(model_of, "clip-llama")
    assert torch.equal(by_rule(model, inputs, vcd(noise_step=0)), by_rule(model, inputs, PLAIN))


def test_a_step_costs_the_second_stream_one_token(model_of) -> None:
    model, inputs = inputs_of(model_of, "clip-llama")
    shapes: list[int] = []
    with model.hooks([("hook_embed", lambda value, hook: shapes.append(value.shape[1]))]):
        by_rule(model, inputs, vcd(), steps=4)
    n = inputs.shape[1]
    assert shapes == [n, n, 1, 1, 1, 1, 1, 1]


def test_noise_follows_the_diffusion_schedule(model_of) -> None:
    model, inputs = inputs_of(model_of, "clip-llama")
    kept = 1.0
    for step in range(501):
        s = 1 / (1 + math.exp(-(-6 + 12 * step / 999)))
        kept *= 1 - (s * (5e-3 - 1e-5) + 1e-5)
    noised = with_noise(model, inputs, 500, seed=4)
    noise = torch.randn(inputs.pixel_values.shape[1:], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = math.sqrt(kept) * inputs.pixel_values[0] + math.sqrt(1 - kept) * noise
    torch.testing.assert_close(noised.pixel_values[0], expected.to(noised.pixel_values))
    assert torch.equal(with_noise(model, inputs, 500, 4).pixel_values, noised.pixel_values)
    assert not torch.equal(with_noise(model, inputs, 500, 5).pixel_values, noised.pixel_values)


@pytest.mark.parametrize("name", ["clip-llama", "llava-next", "qwen2_vl-image-and-video", "qwen3_vl-plain"])
def test_a_rows_noise_is_the_same_in_any_batch_and_spares_the_padding(name: str, model_of) -> None:
    model, inputs = inputs_of(model_of, name)
    together = with_noise(model, inputs, 700, 1)
    for row in range(len(inputs)):
        assert torch.equal(with_noise(model, inputs[row], 700, 1).pixel_values, together[row].pixel_values)
    sizes = inputs.crop_lengths()
    if sizes is not None:
        for picture, n in enumerate(sizes):
            assert torch.equal(together.pixel_values[picture, n:], inputs.pixel_values[picture, n:])


def test_two_frames_that_one_token_reads_share_their_noise() -> None:
    model = bundled("tiny-qwen2vl-emotion")
    inputs = prepared(model, examples())
    noised = with_noise(model, inputs, 900, 0)
    patches = noised.pixel_values.reshape(*noised.pixel_values.shape[:2], 3, 2, 64)
    assert torch.equal(patches[..., 0, :], patches[..., 1, :])
    assert not torch.allclose(noised.pixel_values, inputs.pixel_values, atol=0.1)


def test_without_pictures_only_the_text_is_left_in_its_order() -> None:
    for name in NAMES:
        model = bundled(name)
        inputs = prepared(model, examples())
        blind = without_pictures(model, inputs)
        texts = model.tokenizer.batch_decode([row[mask] for row, mask in zip(blind.tokens, blind.attention_mask)])
        for text, example in zip(texts, examples(), strict=True):
            assert example.prompt.lower() in text.lower() and "image" not in text and "vision" not in text
        alone = model(blind.tokens[0][blind.attention_mask[0]])[0, -1]
        torch.testing.assert_close(model(blind)[0, -1], alone, rtol=1e-4, atol=1e-4)
        assert [s.last for s in blind.spans] == [blind.shape[1] - 1] * 3


def test_rows_without_a_picture_are_refused_by_number(model_of) -> None:
    model, inputs = tiny(model_of, "three-images-and-none")
    bare = inputs.n_images.index(0)
    for method in (vcd(), vcd(a=0.0), pai(0.2, [0], cfg_gamma=1.1)):
        with pytest.raises(ValueError, match=rf"needs an image in every row; rows \[{bare}\] of 3"):
            method.decoding(model, inputs)  # type: ignore[misc]


def test_a_rule_made_for_another_batch_is_refused(model_of) -> None:
    model, inputs = inputs_of(model_of, "clip-llama")
    (rule,) = vcd().decoding(model, inputs)  # type: ignore[misc]
    settings = dict(max_new_tokens=3, eos_token_id=[], return_type="tokens")
    with pytest.raises(ValueError, match="made for 2 rows.*was given 1 rows"):
        model.generate(inputs[0], logits_processor=[rule], **settings)
    first = model.generate(inputs, logits_processor=[rule], **settings)
    assert torch.equal(model.generate(inputs, logits_processor=[rule], **settings), first), "a fresh start is allowed"
    with pytest.raises(ValueError, match="has seen 2 tokens"):
        rule(torch.cat([inputs.tokens, first[:, :1], first[:, :1]], 1)[:, : inputs.shape[1] + 1], torch.zeros(2, 128))


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: vcd(a=-1.0), "a=-1.0"),
        (lambda: vcd(b=0.0), "b=0.0"),
        (lambda: vcd(noise_step=1000), "noise_step=1000.*0 .. 999"),
        (lambda: pai(0.2, [0], cfg_gamma=math.nan), "cfg_gamma=nan"),
    ],
)
def test_settings_outside_their_range_are_refused_at_once(make: Any, telling: str) -> None:
    with pytest.raises(ValueError, match=telling):
        make()
