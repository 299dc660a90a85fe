"""Text as HookedTransformer takes it: padding, sides, BOS tokens, texts of tokens, positions of tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformer_lens.utilities import LocallyOverridenDefaults

from tests.cases import BY_NAME, IMAGE_TOKEN, build_hf, tiny_tokenizer

KINDS = ("own pad", "padded with the end", "one token for all", "no BOS")
TEXTS = st.lists(st.integers(3, IMAGE_TOKEN - 1), min_size=1, max_size=5).map(
    lambda ids: " ".join(f"w{i}" for i in ids)
)


def tokenizer_of(kind: str, side: str = "left") -> Any:
    """Return a tokenizer: pad 0, BOS 1 that it writes, end 2; or the end in place of others; or without BOS."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = side
    if kind != "own pad":
        tokenizer.pad_token = None
    if kind == "one token for all":  # as GPT-2's, which it does not write
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = None
    if kind == "no BOS":
        tokenizer.bos_token, tokenizer.pad_token = None, "<pad>"
        tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


@pytest.fixture(scope="module")
def hf() -> Any:
    return build_hf(BY_NAME["text-llama"], gain=3.0)


def model_of_kind(hf: Any, kind: str, side: str = "left") -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(hf, tokenizer_of(kind, side))


@pytest.fixture(scope="module")
def readers(hf: Any) -> dict[Any, Any]:
    """One model per kind of tokenizer and side, which no test changes."""
    return {(kind, side): model_of_kind(hf, kind, side) for kind in KINDS for side in ("left", "right")}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, phases=[Phase.generate])
@given(texts=st.lists(TEXTS, min_size=2, max_size=3), bos=st.sampled_from([None, True, False]))
def test_a_padded_text_equals_the_text_alone(
    readers: dict[Any, Any], kind: str, side: str, texts: list[str], bos: bool | None
) -> None:
    model = readers[kind, side]
    tokens = model.to_tokens(texts, prepend_bos=bos)
    logits, losses = model(tokens), model(tokens, return_type="loss", loss_per_token=True)
    assert torch.equal(model(texts, prepend_bos=bos), logits)
    new = model.generate(tokens, max_new_tokens=3, return_type="tokens")
    for row, text in enumerate(texts):
        alone = model.to_tokens(text, prepend_bos=bos)
        n = alone.shape[1]
        at = slice(tokens.shape[1] - n, None) if side == "left" else slice(n)
        assert torch.equal(tokens[row, at], alone[0])
        torch.testing.assert_close(logits[row, at], model(alone)[0])
        torch.testing.assert_close(losses[row].sum(), model(alone, return_type="loss", loss_per_token=True).sum())
        said = model.generate(alone, max_new_tokens=3, return_type="tokens")[0]
        assert torch.equal(new[row, : len(said)], said)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[:3])
def test_pads_are_found_in_tokens_that_lost_their_mask(hf: Any, kind: str) -> None:
    for side in ("left", "right"):
        model = model_of_kind(hf, kind, side)
        tokens = model.to_tokens(["w5 w6", "w7 w8 w9 w10"])
        again = tokens.clone()
        assert not hasattr(again, "attention_mask")
        assert torch.equal(model(again), model(tokens))
        if kind != "one token for all":  # alone, a row cannot say whether it begins with BOS or a pad
            torch.testing.assert_close(model(again[:1])[0][tokens[0] == 6], model(model.to_tokens("w5 w6"))[0, -1:])


@torch.no_grad()
def test_a_mask_that_no_longer_fits_its_tokens_is_dropped(hf: Any) -> None:
    model = model_of_kind(hf, "own pad")
    tokens = model.to_tokens(["w5", "w5 w6 w7"])
    tokens[0, 0] = 9
    assert torch.equal(model(tokens), model(tokens.clone()))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@settings(phases=[Phase.generate])
@given(tokens=st.lists(st.lists(st.integers(0, 100), min_size=4, max_size=4), min_size=1, max_size=3))
def test_any_tokens_run(hf: Any, readers: dict[Any, Any], kind: str, tokens: list[list[int]]) -> None:
    model, ids = readers[kind, "left"], torch.tensor(tokens)
    logits = model(ids)
    assert logits.shape[:2] == ids.shape and logits.isfinite().all()
    text = [row for row in range(len(ids)) if ids[row, 0] not in (0, 2) and ids[row, -1] not in (0, 2)]
    if text:
        torch.testing.assert_close(logits[text], hf(input_ids=ids[text]).logits)
    assert model(torch.arange(5)[None]).isfinite().all()


@torch.no_grad()
def test_tools_that_pad_and_draw_tokens_run() -> None:
    from transformer_lens import evals

    from veena_lens import HookedVLM

    # `induction_loss` draws ids up to 20,000.
    big = build_hf(type(BY_NAME["text-llama"])(name="many-tokens", family="text", text=dict(vocab_size=20_000)))
    for kind in KINDS:
        model = HookedVLM.from_hf(big, tokenizer_of(kind))
        if kind != "no BOS":
            templates = ["[A] w9 [B] w10 [B] w11 [A]", "w20 [B] w12 [A] w13 w14 [B] w15 [A]"]
            names = dict(names=["w5", "w6"], nouns={"w9": ["w9"]})
            drawn = evals.IOIDataset(model.tokenizer, templates, num_samples=16, **names)
            assert 0 <= evals.ioi_eval(model, dataset=drawn)["Accuracy"] <= 1
        assert evals.induction_loss(model, batch_size=2, subseq_len=16, device="cpu").isfinite()
        assert evals.sanity_check(model).isfinite()


# --- sides, BOS tokens and lengths -----------------------------------------------------------------------
def test_sides_are_those_asked_for_or_the_tokenizers(hf: Any) -> None:
    model = model_of_kind(hf, "own pad", "right")
    texts = ["w5", "w5 w6"]
    left, right = [[0, 1, 5], [1, 5, 6]], [[1, 5, 0], [1, 5, 6]]
    assert model.to_tokens(texts).tolist() == right
    assert model.to_tokens(texts, padding_side="left").tolist() == left
    model.tokenizer.padding_side = "left"
    assert model.to_tokens(texts).tolist() == left
    assert model.to_tokens(texts, padding_side="right").tolist() == right
    assert model.tokenizer.padding_side == "left"
    with pytest.raises(ValueError, match="'top'.*'left' or 'right'"):
        model.to_tokens(texts, padding_side="top")
    with torch.no_grad():
        assert torch.equal(model(texts, padding_side="right"), model(torch.tensor(right)))


@pytest.mark.parametrize("kind, writes", [("own pad", True), ("padded with the end", True), ("no BOS", False)])
def test_default_of_bos_says_what_happens(hf: Any, kind: str, writes: bool) -> None:
    model = model_of_kind(hf, kind)
    assert model.cfg.default_prepend_bos is writes and model.cfg.tokenizer_prepends_bos is writes
    assert (model.to_tokens("w5")[0, 0] == 1) == writes


def test_default_of_bos_can_be_set(hf: Any) -> None:
    model = model_of_kind(hf, "own pad")
    other = model_of_kind(hf, "own pad")
    model.cfg.default_prepend_bos = False
    assert model.to_tokens("w5").tolist() == [[5]] and other.to_tokens("w5").tolist() == [[1, 5]]
    assert model("w5").shape[1] == 1 and model.to_str_tokens("w5") == ["w5"]
    assert model.to_tokens("w5", prepend_bos=True).tolist() == [[1, 5]]
    assert model.to(torch.float32).cfg.default_prepend_bos is False, "a cast keeps it"
    with LocallyOverridenDefaults(model, prepend_bos=True, padding_side="right"):
        assert model.to_tokens(["w5", "w5 w6"]).tolist() == [[1, 5, 0], [1, 5, 6]]
    assert model.cfg.default_prepend_bos is False and model.tokenizer.padding_side == "left"


def test_a_bos_token_is_added_where_the_tokenizer_has_one_and_writes_none(hf: Any) -> None:
    model = model_of_kind(hf, "own pad")
    silent = copy.deepcopy(tiny_tokenizer())
    silent.backend_tokenizer.post_processor = None
    model.set_tokenizer(silent)
    assert model.cfg.default_prepend_bos is False and model.to_tokens("w5").tolist() == [[5]]
    model.cfg.default_prepend_bos = True
    assert model.to_tokens("w5").tolist() == [[1, 5]] and model("w5").shape[1] == 2


def test_long_texts_are_cut_to_the_context(hf: Any) -> None:
    model = model_of_kind(hf, "own pad")
    n = model.cfg.n_ctx
    text = " ".join(["w5"] * (n + 10))
    assert model.to_tokens(text).shape == (1, n) and model.to_tokens(text)[0, 0] == 1
    assert model.to_tokens(text, truncate=False).shape == (1, n + 11)
    with pytest.raises(ValueError, match=f"{n + 11} tokens"):
        model(text)


def test_arguments_that_do_not_exist_are_refused(hf: Any) -> None:
    model = model_of_kind(hf, "own pad")
    for call in (model.to_tokens, model.to_str_tokens, model):
        with pytest.raises(TypeError, match="'prepend_boss'. Did you mean prepend_bos"):
            call("w5", prepend_boss=False)
    with pytest.raises(TypeError, match="prepare"):
        model.to_tokens("w5", images=[1])
    with pytest.raises(TypeError, match="text or a list of texts.*Tensor"):
        model.to_tokens(torch.tensor([5]))
    with pytest.raises(TypeError, match="forward_hf"):
        model(torch.tensor([[5]]), input_ids=torch.tensor([[5]]))


# --- texts of tokens -----------------------------------------------------------------------------------
def test_texts_of_tokens_come_without_pads(hf: Any) -> None:
    model = model_of_kind(hf, "own pad")
    texts = ["w5", "w5 w6"]
    assert model.to_str_tokens(texts) == [["<s>", "w5"], ["<s>", "w5", "w6"]]
    assert model.to_str_tokens(texts, prepend_bos=False) == [["w5"], ["w5", "w6"]]
    assert model.to_str_tokens(["w5"]) == [["<s>", "w5"]] and model.to_str_tokens("w5") == ["<s>", "w5"]
    assert model.to_str_tokens([5, 6]) == model.to_str_tokens(torch.tensor([[5, 6]])) == ["w5", "w6"]
    assert model.to_str_tokens([[5, 6], [7]]) == [["w5", "w6"], ["w7"]]
    assert model.to_str_tokens(torch.tensor([5, 6]).numpy()) == ["w5", "w6"]
    assert model.to_string([[5, 6], [7]]) == ["w5 w6", "w7"]
    assert model.to_string([5, 6]) == model.to_string(torch.tensor([5, 6])) == "w5 w6"
    assert model.to_string(torch.tensor([[5, 6]])) == ["w5 w6"]
    assert model.to_string(torch.tensor(5)) == "w5"
    inputs = model.as_inputs(["w5 w6 w7", "w8 w9 w10"])
    assert model.to_string(inputs) == model.to_string(inputs.tokens)
    with pytest.raises(ValueError, match="integers"):
        model.to_string(torch.zeros(2, 3, 4, dtype=torch.long))


def test_positions_of_tokens(hf: Any) -> None:
    model = model_of_kind(hf, "own pad")
    text, tokens = "w5 w6 w5", torch.tensor([1, 5, 6, 5])
    for given_as in (text, tokens, tokens[None], model.as_inputs(text)):
        assert model.get_token_position("w5", given_as) == 1
        assert model.get_token_position(5, given_as, mode="last") == 3
    assert model.get_token_position("w5", text, prepend_bos=False) == 0
    for call, message in (
        (lambda: model.get_token_position("w9", text), "does not occur"),
        (lambda: model.get_token_position("w5", text, mode="middle"), "'middle'"),
        (lambda: model.get_token_position("w5", tokens.expand(2, 4)), "one row"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_directions_of_lists(hf: Any) -> None:
    model = model_of_kind(hf, "own pad")
    expected = model.tokens_to_residual_directions(torch.tensor([5, 6]))
    assert torch.equal(model.tokens_to_residual_directions([5, 6]), expected)
    assert torch.equal(model.tokens_to_residual_directions(["w5", "w6"]), expected)
    assert torch.equal(model.tokens_to_residual_directions("w5"), expected[0])
