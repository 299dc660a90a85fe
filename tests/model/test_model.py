"""The model as an object: configuration, dtype and device, export, random models, copies, and what it prints."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch

from tests.cases import BY_NAME, build_hf, counted, hf_model, native_model, raw_inputs, relative_error

FEW = ["clip-llama", "siglip-qwen2", "both-biases-tied", "feature-zero", "text-mistral", "text-llama-tied-llama3"]


@pytest.mark.parametrize("name", FEW)
def test_configuration_says_what_the_checkpoint_is(name: str) -> None:
    model, config = native_model(BY_NAME[name]), hf_model(BY_NAME[name]).config
    text, cfg = getattr(config, "text_config", config), model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
    )
    assert (cfg.n_key_value_heads, cfg.d_mlp, cfg.d_vocab) == (
        text.num_key_value_heads,
        text.intermediate_size,
        text.vocab_size,
    )
    assert cfg.n_ctx == text.max_position_embeddings and cfg.eps == text.rms_norm_eps
    assert (
        cfg.dtype == torch.float64
        and str(cfg.device) == "cpu"
        and cfg.architecture == type(hf_model(BY_NAME[name])).__name__
    )
    assert (cfg.vision is None) == name.startswith("text")
    assert len(repr(cfg).splitlines()) > 3 and "n_layers=" in repr(cfg)
    with pytest.raises(FrozenInstanceError):
        cfg.n_layers = 3


def test_moving_to_another_dtype_replaces_the_configuration() -> None:
    from veena_lens import HookedVLM

    case = BY_NAME["clip-llama"]
    model = HookedVLM.from_hf(build_hf(case), copy=True)
    before = model.cfg
    assert model.to(torch.float32) is model
    assert model.cfg.dtype == torch.float32 and before.dtype == torch.float64
    raw = raw_inputs(case)
    with torch.no_grad():
        theirs = hf_model(case, torch.float32)(**dict(raw, pixel_values=raw["pixel_values"].float())).logits
        assert relative_error(model.forward_hf(**raw), theirs, raw["attention_mask"]) < 1e-5
    assert model.bfloat16().cfg.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_copy_of_a_model_is_its_own_and_has_its_own_hooks() -> None:
    from veena_lens import HookedVLM

    case = BY_NAME["both-biases-tied"]
    model = HookedVLM.from_hf(build_hf(case))
    inputs = model.inputs_from_hf(**counted(raw_inputs(case)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        plain = model(inputs)
        assert torch.equal(twin(inputs), plain)
        twin.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 0)
        assert not torch.equal(twin(inputs), plain) and torch.equal(model(inputs), plain)
        twin.reset_hooks()
        twin.W_E.data.mul_(2)
        assert torch.equal(model(inputs), plain)
        assert relative_error(twin.W_U, model.W_U * 2) == 0, "the copy's tied unembedding reads the copy's embedding"


def test_tied_weights_are_one_parameter() -> None:
    tied, untied = native_model(BY_NAME["both-biases-tied"]), native_model(BY_NAME["clip-llama"])
    assert tied.W_U.data_ptr() == tied.W_E.data_ptr() and untied.W_U.data_ptr() != untied.W_E.data_ptr()
    for model, name in ((tied, "both-biases-tied"), (untied, "clip-llama")):
        ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, hf_model(BY_NAME[name])))
        assert ours == theirs


def test_random_model_of_a_configuration_runs_and_can_be_trained() -> None:
    from dataclasses import replace

    from veena_lens import HookedVLM

    torch.manual_seed(3)
    case = BY_NAME["clip-llama"]
    model = HookedVLM(replace(native_model(case).cfg, dtype=None, device=None))
    inputs = model.inputs_from_hf(**counted(raw_inputs(case, torch.float32)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(inputs, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert model.cfg.dtype == torch.float32


def test_gradients_reach_every_weight_that_the_logits_read() -> None:
    from veena_lens import HookedVLM

    case = BY_NAME["feature-list-full-ends"]
    hf = build_hf(case)
    model, raw = HookedVLM.from_hf(hf, copy=True), raw_inputs(case)
    model.forward_hf(**raw)[:, -1].sum().backward()
    hf(**raw).logits[:, -1].sum().backward()
    theirs = {p.shape: None for p in hf.parameters()}
    assert theirs
    ours = {name: p.grad for name, p in model.named_parameters()}
    without = [n for n, g in ours.items() if g is None]
    assert all(n.startswith("vision.unused.") for n in without), without
    total = {"ours": 0.0, "theirs": 0.0}
    for name, model_of in (("ours", model), ("theirs", hf)):
        total[name] = sum(float(p.grad.pow(2).sum()) for p in model_of.parameters() if p.grad is not None)
    assert abs(total["ours"] / total["theirs"] - 1) < 1e-9


def test_model_prints_what_it_is() -> None:
    for name in FEW:
        text = repr(native_model(BY_NAME[name]))
        assert "2 layers" in text and "6 heads" in text and "float64" in text and "parameters" in text
        assert len(text.splitlines()) <= 10


def test_package_names_resolve_and_unknown_ones_do_not() -> None:
    import veena_lens

    for name in veena_lens.__all__:
        assert getattr(veena_lens, name) is not None
    with pytest.raises(AttributeError, match="HookedVML"):
        _ = veena_lens.HookedVML


@pytest.mark.parametrize("architecture", ["BertModel", "GPT2LMHeadModel"])
def test_unknown_architecture_is_refused_and_known_ones_are_named(architecture: str) -> None:
    import transformers as hf

    from veena_lens import HookedVLM

    config = dict(
        BertModel=hf.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16
        ),
        GPT2LMHeadModel=hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16),
    )[architecture]
    with pytest.raises(ValueError, match=f"{architecture}.*LlavaForConditionalGeneration"):
        HookedVLM.from_hf(getattr(hf, architecture)(config))
