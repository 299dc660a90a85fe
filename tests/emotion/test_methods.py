"""Methods: what is prepared, in force and gone again; one value that does nothing leaves every bit as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.circuits.tiny import ready as tiny
from tests.emotion.asked import bundled, examples
from veena_lens.emotion.enhance.veena import ena, vee, veena
from veena_lens.emotion.judge.side_effects import Asked
from veena_lens.emotion.methods import PLAIN, Method, batches, generate_answers, next_logits, prepared
from veena_lens.interventions import Steer

NAME = "tiny-llava-emotion"
HEADS, NEURONS = [(0, 1), (1, 0), (1, 4)], [(0, 3), (1, 7), (1, 90)]
NOTHING = {
    "beta 1, renorm": vee(HEADS, 1.0),
    "beta 1, logit": vee(HEADS, 1.0, mode="logit"),
    "beta 1, scale": vee(HEADS, 1.0, mode="scale"),
    "gamma 1": ena(NEURONS, 1.0),
    "alpha 0": [Steer(1, torch.randn(48, dtype=torch.float64), 0.0, "query+generated")],
    "all of them": [*veena(HEADS, NEURONS, 1.0, 1.0), Steer(0, torch.ones(48, dtype=torch.float64), 0.0)],
}


def hooks_left(model: Any) -> list[str]:
    return [name for name, hook in model.hook_dict.items() if hook._forward_hooks or hook._backward_hooks]


@pytest.mark.parametrize("what", NOTHING)
def test_a_strength_of_nothing_leaves_every_bit_and_no_hook(what: str, model_of) -> None:
    model, inputs = tiny(model_of, "clip-llama")
    with torch.no_grad():
        plain = model(inputs)
        with Method(name=what, interventions=NOTHING[what]).applied(model, inputs):
            edited = model(inputs)
        assert torch.equal(plain, edited)
        assert torch.equal(plain, model(inputs)) and not hooks_left(model)


def test_answers_under_a_strength_of_nothing_are_the_plain_ones() -> None:
    model = bundled(NAME)
    quiet = Method(name="nothing", interventions=veena([(4, 0), (5, 1)], [(3, 2), (6, 5)], 1.0, 1.0))
    said = generate_answers(model, examples(), max_new_tokens=5)
    assert generate_answers(model, examples(), quiet, max_new_tokens=5) == said
    assert torch.equal(next_logits(model, examples(), quiet), next_logits(model, examples()))
    assert len(set(said)) > 1 and not hooks_left(model)


def test_an_error_while_a_method_is_in_force_leaves_no_hook() -> None:
    model = bundled(NAME)
    inputs = prepared(model, examples()[:1])
    loud = Method(name="loud", interventions=vee([(0, 0)], 9.0))
    before = model(inputs)
    with pytest.raises(RuntimeError, match="stopped"), loud.applied(model, inputs):
        assert not torch.equal(model(inputs), before)
        raise RuntimeError("stopped")
    assert torch.equal(model(inputs), before) and not hooks_left(model)


def test_a_list_for_each_row_acts_on_that_row_alone_and_is_made_before_the_block() -> None:
    model, some = bundled(NAME), examples()
    seen: list[Any] = []
    loud = vee([(layer, head) for layer in range(3, 8) for head in range(4)], 20.0, mode="scale")

    def per_row(model: Any, inputs: Any) -> list[list[Any]]:
        seen.append(model(inputs)[:, -1])
        return [[], list(loud), []]

    mixed = next_logits(model, some, Method(name="second row", interventions=per_row))
    plain, edited = next_logits(model, some), next_logits(model, some, Method(name="all", interventions=loud))
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], edited[1], rtol=1e-4, atol=1e-4)
    assert float((mixed[1] - plain[1]).abs().max()) > 0.1
    torch.testing.assert_close(seen[0].float(), plain, rtol=1e-4, atol=1e-4)


def test_a_reworded_prompt_is_what_the_model_is_asked() -> None:
    model = bundled(NAME)
    shout = Method(name="reworded", prompt=lambda text: f"look at the face. {text}")
    asked = [Asked(picture=e.picture, prompt=f"look at the face. {e.prompt}") for e in examples()]
    assert torch.equal(prepared(model, examples(), shout).tokens, prepared(model, asked).tokens)
    assert not torch.equal(next_logits(model, examples(), shout), next_logits(model, examples()))


def test_rules_of_decoding_are_made_anew_for_each_batch_and_decide_the_tokens() -> None:
    model, made = bundled(NAME), []
    wanted = int(model.tokenizer(" sad", add_special_tokens=False)["input_ids"][-1])

    def only_sad(model: Any, inputs: Any) -> list[Any]:
        made.append(len(inputs.tokens))

        def rule(ids: Any, scores: Any) -> Any:
            out = torch.full_like(scores, -1e4)
            out[:, wanted] = 0.0
            return out

        return [rule]

    said = generate_answers(model, examples(), Method(name="sad", decoding=only_sad), batch_size=2, max_new_tokens=2)
    assert made == [2, 1] and all(text.split() == ["sad", "sad"] for text in said)


def test_batches_keep_the_order_and_a_lead_in_stands_last() -> None:
    assert list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    model = bundled(NAME)
    together, alone = (generate_answers(model, examples(), batch_size=n, max_new_tokens=3) for n in (3, 1))
    assert together == alone
    inputs = prepared(model, examples(), lead_in="The person feels")
    assert all(model.tokenizer.decode(row).endswith("assistant: the person feels") for row in inputs.tokens)


@pytest.mark.parametrize("sizes", [(0, 32), (16, 0)])
def test_sizes_below_one_are_refused_before_anything_runs(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        generate_answers(None, examples(), batch_size=sizes[0], max_new_tokens=sizes[1])


def test_a_method_shows_its_settings() -> None:
    assert repr(PLAIN) == "Method('plain')"
    assert repr(Method(name="VEE", settings={"beta": 2.0, "mode": "scale"})) == "Method('VEE': beta=2.0, mode=scale)"
