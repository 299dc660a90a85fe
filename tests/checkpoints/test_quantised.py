"""Checkpoints of 4 and 8 bits: refused before any weight is read where they cannot run, else Hugging Face's numbers.

What needs bitsandbytes or torchao runs where they are installed; both run on a CPU.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.cases import BY_NAME, Case, raw_inputs, relative_error
from tests.checkpoints import tiny
from veena_lens import HookedVLM
from veena_lens.checkpoints import open_checkpoint, quantised, save_pretrained

ODD = BY_NAME["qwen2_5_vl-plain"]  # rows of 48, 32 and 40 numbers
CASE = Case(  # every row is a whole number of blocks of 64
    name="packed",
    family="qwen2_5_vl",
    text=dict(hidden_size=64, intermediate_size=128, num_attention_heads=8),
    vision=dict(hidden_size=64, out_hidden_size=64, intermediate_size=64),
)
BNB4 = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
AO = dict(quant_method="torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}})


def marked(folder: Path, settings: dict[str, Any] | None) -> Path:
    """A folder of float weights whose configuration says that they are quantised; its weights cannot be read."""
    tiny.save(CASE, folder, with_processor=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=settings)))
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            BNB4,
            r"quantised by bitsandbytes \(load_in_4bit=True\), .* is not installed: run `pip install bitsandbytes`, or",
        ),
        (
            dict(load_in_8bit=True),
            r"quantised by bitsandbytes \(load_in_8bit=True\), but bitsandbytes is not installed",
        ),
        (
            AO,
            r"torchao \(quant_type='Int8WeightOnlyConfig'\), but torchao is not .*: run `pip install torchao`, or",
        ),
        (
            dict(quant_method="gptq", bits=4),
            "quantised by 'gptq' .*'bits': 4.*bitsandbytes and torchao can be loaded. Use",
        ),
        (dict(quant_method="awq", bits=4), "quantised by 'awq'"),
        (dict(bits=8), "quantised by None .*'bits': 8"),
    ],
    ids=["bitsandbytes-4", "bitsandbytes-8-unnamed", "torchao", "gptq", "awq", "unnamed"],
)
def test_weights_that_cannot_run_are_refused_before_any_is_read(
    settings: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    folder = marked(tmp_path, settings)
    with pytest.raises(ValueError, match=told):
        HookedVLM.from_pretrained(folder)


def test_model_in_memory_of_packed_weights_is_refused_with_the_way_to_load_it(tmp_path: Path) -> None:
    theirs, _ = tiny.save(CASE, tmp_path, with_processor=False)
    theirs.config.quantization_config = BNB4
    with pytest.raises(ValueError, match="quantised .*from_pretrained reads bitsandbytes and torchao weights"):
        HookedVLM.from_hf(theirs)


def test_configuration_is_described_without_the_package(tmp_path: Path) -> None:
    """`inspect` and `open_checkpoint` read no weight."""
    folder = marked(tmp_path, BNB4)
    quantisation = quantised.scheme_of(open_checkpoint(folder).hf_config)
    assert quantisation is not None and quantisation.summary == "bitsandbytes (load_in_4bit=True)"
    assert open_checkpoint(folder).cfg.vision is not None


# --- with the packages ---------------------------------------------------------------------------------------
def settings_of(form: str) -> Any:
    """Hugging Face's configuration of a form. Skips where its package is missing."""
    package = "torchao" if form.startswith("torchao") else "bitsandbytes"
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    if form == "torchao 8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if form == "torchao 4":
        from torchao.quantization import IntxWeightOnlyConfig

        return transformers.TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4))
    if form == "bitsandbytes 8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    kind, nested = form.removeprefix("bitsandbytes 4 ").split()
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested == "nested",
        bnb_4bit_compute_dtype=torch.float32,
    )


FORMS = ["bitsandbytes 4 nf4 nested", "bitsandbytes 4 fp4 plain", "bitsandbytes 8", "torchao 8", "torchao 4"]
EXACT = [form for form in FORMS if form != "bitsandbytes 8"]  # that one rounds activations as well


def packed(case: Case, form: str, folder: Path) -> Path:
    """A tiny checkpoint, quantised and written by Hugging Face."""
    settings = settings_of(form)
    _, plain = tiny.save(case, folder / "plain", with_processor=False)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        plain, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder / "packed")
    return folder / "packed"


def hugging_face(folder: Path) -> Any:
    """Hugging Face's model of a packed folder."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    for module in model.modules():  # its fast path on some processors wants blocks that rows of a tiny model lack
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_packed_checkpoint_computes_what_hugging_face_computes_with_every_hook(form: str, tmp_path: Path) -> None:
    folder = packed(CASE, form, tmp_path)
    theirs, ours = hugging_face(folder), HookedVLM.from_pretrained(folder)
    raw = raw_inputs(CASE, torch.float32)
    tokens = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(input_ids=tokens, output_hidden_states=True)
        logits, cache = ours.run_with_cache(tokens)
        assert relative_error(logits, wanted.logits) < 1e-5
        assert relative_error(cache["resid_pre", 2], wanted.hidden_states[2]) < 1e-5
        expected = theirs(**raw).logits
        bound = 2e-6 if form in EXACT else 5e-2
        assert relative_error(ours.forward_hf(**raw), expected, raw["attention_mask"]) < bound
        assert len(cache) > 60 and "blocks.1.attn.hook_pattern" in cache
        edited = ours.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)])
        heard = ours.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_result", lambda r, hook: r * 0)])
    assert relative_error(edited, logits) > 1e-3 and relative_error(heard, edited) < 1e-4


def numbers(linear: Any) -> torch.Tensor:
    """The weight of one of Hugging Face's packed modules, dequantised by the package itself."""
    weight = linear.weight
    if hasattr(weight, "dequantize") and not hasattr(weight, "SCB") and not hasattr(weight, "quant_state"):
        return weight.dequantize()
    from bitsandbytes import functional

    if hasattr(weight, "SCB"):
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return functional.dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_weights_read_as_dequantised_copies(form: str, tmp_path: Path) -> None:
    """They multiply as the packed ones do, and writing to them changes nothing."""
    folder = packed(CASE, form, tmp_path)
    ours: Any = HookedVLM.from_pretrained(folder)
    plain: Any = HookedVLM.from_pretrained(tmp_path / "plain")
    bits = 4 if " 4" in form else 8
    theirs = hugging_face(folder).model.language_model.layers[1]
    block, layer = ours.blocks[1], theirs.self_attn
    for mine, linear in (
        (block.attn.q, layer.q_proj),
        (block.attn.o, layer.o_proj),
        (block.mlp.down, theirs.mlp.down_proj),
    ):
        assert torch.allclose(mine.weight, numbers(linear), rtol=1e-5, atol=1e-8)
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"):
        mine, true = getattr(ours, name), getattr(plain, name)
        assert mine.dtype == torch.float32 and mine.shape == true.shape
        assert 0 < float((mine - true).norm() / true.norm()) < (0.15 if bits == 4 else 0.02), name
    mlp = ours.blocks[1].mlp
    stored = sum(p.numel() * p.element_size() for p in mlp.parameters() if p.dtype in (torch.uint8, torch.int8))
    if form.startswith("bitsandbytes"):
        assert stored == 3 * 64 * 128 * bits // 8
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for part in (mlp.up, ours.blocks[0].attn.q):
            bias = 0 if part.bias is None else part.bias
            assert relative_error(part(x), x @ part.weight.T + bias) < (1e-5 if form in EXACT else 2e-2)
        before = ours.blocks[0].mlp.W_out.clone()
        ours.blocks[0].mlp.W_out.mul_(0)
        assert torch.equal(ours.blocks[0].mlp.W_out, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_part_of_a_block_keep_their_own_scales(form: str, tmp_path: Path) -> None:
    """Also on a CPU, whose kernel of 4 bits takes wrong ones: such weights are then held as numbers."""
    ours: Any = HookedVLM.from_pretrained(packed(ODD, form, tmp_path))
    plain: Any = HookedVLM.from_pretrained(tmp_path / "plain")
    bound = 0.15 if " 4" in form else 0.02
    for part in ("blocks.1.mlp.up", "blocks.0.attn.q", "vision.blocks.0.attn.k", "vision.blocks.1.mlp.down"):
        mine, true = ours.get_submodule(part), plain.get_submodule(part)
        assert 0 < float((mine.weight - true.weight).norm() / true.weight.norm()) < bound, part
        x = torch.randn(3, mine.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert relative_error(mine(x), x @ mine.weight.T + (0 if mine.bias is None else mine.bias)) < 2e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["bitsandbytes 4 nf4 nested", "torchao 8"])
def test_packed_checkpoint_is_saved_as_float_weights(form: str, tmp_path: Path) -> None:
    folder = packed(CASE, form, tmp_path)
    ours = HookedVLM.from_pretrained(folder)
    out = save_pretrained(ours, tmp_path / "float", open_checkpoint(folder).hf_config)
    again, raw = HookedVLM.from_pretrained(out), raw_inputs(CASE, torch.float32)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(out)
    with torch.no_grad():
        logits = ours.forward_hf(**raw)
        assert relative_error(again.forward_hf(**raw), logits, raw["attention_mask"]) < 2e-6
        assert relative_error(theirs(**raw).logits, logits, raw["attention_mask"]) < 2e-6


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_generate_and_carry_gradients_to_the_inputs(tmp_path: Path) -> None:
    """As attribution needs it."""
    ours = HookedVLM.from_pretrained(packed(CASE, "bitsandbytes 4 nf4 nested", tmp_path))
    raw = raw_inputs(CASE, torch.float32)
    inputs = ours.inputs_from_hf(**raw)
    assert ours.generate(inputs, max_new_tokens=3, return_type="tokens", eos_token_id=[]).shape == (3, 3)
    seen = []
    ours.run_with_hooks(
        inputs,
        return_type="loss",
        fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x) or x.retain_grad())],
    ).backward()
    assert seen[0].grad is not None and float(seen[0].grad.abs().max()) > 0


@pytest.mark.filterwarnings("ignore")
def test_device_that_the_package_does_not_run_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed(CASE, "bitsandbytes 8", tmp_path)
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ValueError, match=r"\(load_in_8bit=True\); bitsandbytes .* runs on cuda, not on cpu: pass an"):
        HookedVLM.from_pretrained(folder)
