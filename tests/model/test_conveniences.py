"""What a HookedTransformer notebook calls works, or a sentence says what takes its place."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, build_hf, counted, raw_inputs, tiny_tokenizer
from veena_lens import HookedVLM
from veena_lens.model.conveniences import ABSENT


@pytest.fixture(scope="module")
def model() -> Any:
    return HookedVLM.from_hf(build_hf(BY_NAME["text-llama"], gain=3.0), processor=copy.deepcopy(tiny_tokenizer()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text-llama")
    build_hf(BY_NAME["text-llama"]).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


# --- loading --------------------------------------------------------------------------------------------
def test_weights_that_stay_are_what_is_loaded(folder: Path) -> None:
    plain = HookedVLM.from_pretrained(folder)
    off = dict.fromkeys(
        ["fold_ln", "center_writing_weights", "center_unembed", "refactor_factored_attn_matrices", "fold_value_biases"],
        False,
    )
    for other in (
        HookedVLM.from_pretrained(folder, **off, n_devices=1, move_to_device=True, dtype="float64"),
        HookedVLM.from_pretrained_no_processing(folder),
        HookedVLM.from_pretrained(folder, hf_model=build_hf(BY_NAME["text-llama"]), tokenizer=tiny_tokenizer()),
    ):
        assert torch.equal(other(torch.tensor([[5, 6]])), plain(torch.tensor([[5, 6]])))
    set_up = HookedVLM.from_pretrained(folder, default_padding_side="right", default_prepend_bos=False)
    assert set_up.tokenizer.padding_side == "right" and set_up.cfg.default_prepend_bos is False
    given = HookedVLM.from_pretrained(folder, tokenizer=(own := copy.deepcopy(tiny_tokenizer())))
    assert given.tokenizer is own
    plain.process_weights_(**off)


@pytest.mark.parametrize("given, error, message", [
    (dict(fold_ln=True), ValueError, "fold_ln is not done: weights stay.*tokens_to_residual_directions"),
    (dict(center_unembed=True, fold_ln=False), ValueError, "center_unembed is not done"),
    (dict(n_devices=2), ValueError, "device_map"),
    (dict(checkpoint_index=3), ValueError, "revision="),
    (dict(fold_layernorm=False), TypeError, "'fold_layernorm'. Did you mean fold_ln"),
    (dict(dtype="float61"), ValueError, "'float61' is not a torch dtype"),
], ids=str)  # fmt: skip
def test_weights_that_would_change_are_refused(given: Any, error: Any, message: str, folder: Path) -> None:
    with pytest.raises(error, match=message):
        HookedVLM.from_pretrained(folder, **given)


def test_processing_later_is_refused(model: Any) -> None:
    for call in (lambda: model.process_weights_(), lambda: model.process_weights_(fold_ln=True)):
        with pytest.raises(ValueError, match="fold_ln.* is not done"):
            call()


@pytest.mark.parametrize("name", ABSENT)
def test_absent_names_say_what_takes_their_place(name: str, model: Any) -> None:
    assert not hasattr(model, name) and getattr(model, name, None) is None
    with pytest.raises(AttributeError, match=f"HookedVLM has no {name}: "):
        getattr(model, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = model.no_such_name


# --- inputs and losses --------------------------------------------------------------------------------------
@torch.no_grad()
def test_embedding_goes_on_where_it_stopped(model: Any) -> None:
    texts = ["w5 w6", "w7 w8 w9"]
    resid, tokens, nothing, mask = model.input_to_embed(texts)
    assert nothing is None and tokens.shape == mask.shape == resid.shape[:2]
    again = model(resid, start_at_layer=0, tokens=tokens, attention_mask=mask, shortformer_pos_embed=None)
    assert torch.equal(again, model(texts))
    pictured = HookedVLM.from_hf(build_hf(BY_NAME["clip-llama"]))
    inputs = pictured.inputs_from_hf(**counted(raw_inputs(BY_NAME["clip-llama"])))
    resid, tokens, _, mask = pictured.input_to_embed(inputs)
    assert torch.equal(pictured(resid, start_at_layer=0, tokens=tokens, attention_mask=mask), pictured(inputs))


@torch.no_grad()
def test_losses_of_logits_are_those_of_the_model(model: Any) -> None:
    tokens = model.to_tokens(["w5 w6", "w7 w8 w9"])
    both = model(tokens, return_type="both")
    assert torch.equal(both.loss, both[1]) and torch.equal(both.logits, both[0])
    assert torch.equal(model.loss_fn(both.logits, tokens), both.loss)
    per_token = model.loss_fn(both.logits, tokens, per_token=True)
    assert torch.equal(per_token, model(tokens, return_type="loss", loss_per_token=True))
    mask = torch.ones_like(tokens)
    assert torch.equal(model.loss_fn(both.logits, tokens, mask), model.loss_fn(both.logits, tokens, mask.bool()))
    assert (model.loss_fn(both.logits, tokens, mask) - both.loss).abs() > 1e-3


# --- parameters and parts -----------------------------------------------------------------------------------
def test_parameters_are_counted_and_named(model: Any) -> None:
    cfg = model.cfg
    assert model.n_params_total == sum(p.numel() for p in model.parameters())
    assert cfg.n_params == cfg.n_layers * (4 * cfg.d_model * cfg.d_head * cfg.n_heads + 3 * cfg.d_model * cfg.d_mlp)
    assert list(dict(model.tl_named_parameters())) == list(model.get_params()) == list(model.tl_parameters())
    assert cfg.use_normalization_before_and_after is False
    assert HookedVLM.from_hf(build_hf(BY_NAME["gemma3-narrow-window"])).cfg.use_normalization_before_and_after is True


def test_moving_as_hooked_transformer_does(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.to("cpu") is model and capsys.readouterr().out == ""
    other = copy.deepcopy(model)
    assert other.to("bfloat16").cfg.dtype == other.to(dtype="bf16").cfg.dtype == torch.bfloat16
    assert other.to("cpu", "float64").cfg.dtype == torch.float64
    with pytest.raises(ValueError, match="'cpuu' names no device such as .* known: float64"):
        model.to("cpuu")
    assert model.to("cpu", print_details=True) is model
    assert "cpu" in capsys.readouterr().out
    model.move_model_modules_to_device()


@torch.no_grad()
def test_a_block_runs_by_itself(model: Any) -> None:
    _, cache = model.run_with_cache("w5 w6 w7")
    for layer in range(2):
        torch.testing.assert_close(model.blocks[layer](cache["resid_pre", layer]), cache["resid_post", layer])
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin("w5 w6"), model("w5 w6"))
    twin.blocks[0].attn.v.weight.zero_()
    changed = copy.deepcopy(twin)
    assert not torch.equal(changed.blocks[0](cache["resid_pre", 0]), model.blocks[0](cache["resid_pre", 0]))
    x = cache["resid_pre", 0]
    for call in (lambda: model.blocks[0].attn(x, x, x), lambda: model.blocks[0].attn(query_input=x, key_input=x)):
        with pytest.raises(TypeError, match=r"model.blocks\[l\]\(resid\).*hook_q_input"):
            call()


def test_biases_end_with_the_last_layer(model: Any) -> None:
    n = model.cfg.n_layers
    assert model.accumulated_bias(n).shape == (model.cfg.d_model,)
    assert torch.equal(model.accumulated_bias(n - 1, mlp_input=True), model.b_O.sum(0) + model.b_out[:-1].sum(0))
    for layer, mlp_input in ((n, True), (n + 1, False), (-1, False)):
        with pytest.raises(ValueError, match=rf"layer={layer}.*{n} layers"):
            model.accumulated_bias(layer, mlp_input=mlp_input)


# --- pickles --------------------------------------------------------------------------------------------
@torch.no_grad()
def test_inputs_and_caches_pickle(model: Any) -> None:
    inputs = model.as_inputs(["w5 w6", "w7"])
    again = pickle.loads(pickle.dumps(inputs))
    assert torch.equal(model(again), model(inputs))
    assert torch.equal(again.with_answer("w9").tokens, inputs.with_answer("w9").tokens)
    file = io.BytesIO()
    torch.save(inputs, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).tokens, inputs.tokens)
    _, cache = model.run_with_cache(inputs, names_filter="blocks.1.hook_resid_post")
    loaded = pickle.loads(pickle.dumps(cache))
    assert torch.equal(loaded["resid_post", 1], cache["resid_post", 1]) and torch.equal(
        loaded.at("last", "resid_post", 1), cache.at("last", "resid_post", 1)
    )
