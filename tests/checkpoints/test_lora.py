"""LoRA adapters in peft's files, merged at load: W + scaling B A on Hugging Face's model, and what is refused."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cases import BY_NAME, Case, build_hf, raw_inputs, relative_error
from tests.checkpoints import tiny
from veena_lens import HookedVLM
from veena_lens.checkpoints import open_checkpoint, save_pretrained

CASE, TIED = BY_NAME["qwen2_5_vl-plain"], BY_NAME["qwen2_5_vl-tied"]
QUERY, QKV = "model.language_model.layers.1.self_attn.q_proj", "model.visual.blocks.0.attn.qkv"
DOWN, HEAD = "model.language_model.layers.0.mlp.down_proj", "lm_head"
CONFIG = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj"], bias="none")


def write(folder: Path, hf: Any, modules: dict[str, int], *, names: Any = None, **changes: Any) -> dict[str, Any]:
    """An adapter's folder, ranks by module, with names as `names` makes them; the two matrices of each module."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    made, stored = {}, {}
    for module, rank in modules.items():
        rows, columns = hf.get_submodule(module).weight.shape
        down, up = (torch.randn(s, generator=generator) * 0.3 for s in ((rank, columns), (rows, rank)))
        made[module] = (down, up)
        at = f"base_model.model.{module if names is None else names(module)}"
        stored |= {f"{at}.lora_A.weight": down, f"{at}.lora_B.weight": up}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return made


def merged(case: Case, made: dict[str, Any], scale: Any) -> Any:
    """Hugging Face's model with the products added by hand."""
    hf = build_hf(case)
    with torch.no_grad():
        for module, (down, up) in made.items():
            hf.get_submodule(module).weight += (scale(module, len(down)) * (up @ down)).double()
    return hf


def agree(ours: HookedVLM, hf: Any, case: Case = CASE) -> None:
    raw = raw_inputs(case)
    with torch.no_grad():
        assert relative_error(ours.forward_hf(**raw), hf(**raw).logits, raw["attention_mask"]) < 1e-9


MODULES = {QUERY: 4, QKV: 4, DOWN: 4, HEAD: 4, "model.visual.merger.mlp.2": 4}


@pytest.mark.parametrize(
    ("modules", "names", "changes", "scale"),
    [
        (MODULES, None, {}, lambda module, rank: 12 / rank),
        (MODULES, tiny.on_disk, dict(use_rslora=True), lambda module, rank: 12 / math.sqrt(rank)),
        (
            {QUERY: 2, QKV: 4, DOWN: 7},
            None,
            dict(
                rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 7},
                alpha_pattern={"layers.1.self_attn.q_proj": 5, "mlp.[a-z]+_proj": 3.5},
                target_modules=r".*\.(q_proj|qkv|down_proj)",
                lora_dropout=0.1,
                inference_mode=True,
            ),
            lambda module, rank: {QUERY: 5, DOWN: 3.5}.get(module, 12) / rank,
        ),
    ],
    ids=["standard", "rank-stabilised-old-names", "patterns"],
)
def test_merged_adapter_equals_products_added_to_hugging_face(
    modules: dict[str, int], names: Any, changes: dict[str, Any], scale: Any, tmp_path: Path
) -> None:
    """Fused queries, keys and values, the merger and the head among what is tuned."""
    base, folder = tmp_path / "base", tmp_path / "lora"
    hf, _ = tiny.save(CASE, base, torch.float64, with_processor=False)
    made = write(folder, hf, modules, names=names, base_model_name_or_path=str(base), **changes)
    ours = HookedVLM.from_pretrained(base, lora=folder)
    agree(ours, merged(CASE, made, scale))
    alone = HookedVLM.from_pretrained(folder)  # the folder names its base
    plain, raw = HookedVLM.from_pretrained(base), raw_inputs(CASE)
    with torch.no_grad():
        assert torch.equal(alone.forward_hf(**raw), ours.forward_hf(**raw))
        assert relative_error(plain.forward_hf(**raw), ours.forward_hf(**raw), raw["attention_mask"]) > 1e-3
    out = save_pretrained(ours, tmp_path / "merged", open_checkpoint(base).hf_config)
    agree(HookedVLM.from_pretrained(out), merged(CASE, made, scale))


def test_whole_modules_and_biases_take_the_place_of_the_base(tmp_path: Path) -> None:
    """`modules_to_save`, and biases that were trained beside the products."""
    base, folder = tmp_path / "base", tmp_path / "lora"
    hf, _ = tiny.save(CASE, base, torch.float64, with_processor=False)
    made = write(folder, hf, {QUERY: 4}, modules_to_save=["lm_head"], bias="lora_only")
    stored = load_file(folder / "adapter_model.safetensors")
    head, bias = torch.randn(128, 48, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    stored |= {f"base_model.model.{HEAD}.weight": head, f"base_model.model.{QUERY}.base_layer.bias": bias}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    expected = merged(CASE, made, lambda module, rank: 3.0)
    with torch.no_grad():
        expected.lm_head.weight.copy_(head)
        expected.get_submodule(QUERY).bias.copy_(bias)
    agree(HookedVLM.from_pretrained(base, lora=folder), expected)


def test_pickled_adapter_in_half_precision_is_merged_in_single(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "lora"
    hf, _ = tiny.save(CASE, base, torch.float64, with_processor=False)
    write(folder, hf, {QUERY: 4, DOWN: 4})
    stored = {k: v.bfloat16() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(stored, folder / "adapter_model.bin")
    at = "base_model.model."
    made = {m: [stored[f"{at}{m}.lora_{x}.weight"].float() for x in "AB"] for m in (QUERY, DOWN)}
    agree(HookedVLM.from_pretrained(base, lora=folder), merged(CASE, made, lambda module, rank: 3.0))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(use_dora=True), "use_dora=True is not supported.*Merge the adapter with peft"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out=True is not supported"),
        (dict(lora_bias=True), "lora_bias=True is not supported"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported"),
        (dict(layer_replication=[[0, 2], [1, 3]]), r"layer_replication=\[\[0, 2\], \[1, 3\]\] is not"),
        (dict(target_parameters=["experts.up"]), "target_parameters="),
        (dict(trainable_token_indices=[5]), "trainable_token_indices="),
        (dict(a_new_option=3), "a_new_option=3 is not supported"),
        (dict(peft_type="IA3"), "is an adapter of type 'IA3'; only LORA is supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_standard_lora_lacks_is_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Before the base is looked for."""
    write(tmp_path, build_hf(CASE), {QUERY: 4}, **changes)
    with pytest.raises(ValueError, match=told):
        HookedVLM.from_pretrained(tmp_path / "no such base", lora=tmp_path)


def test_entries_that_do_not_fit_are_listed_together(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "lora"
    hf, _ = tiny.save(CASE, base, with_processor=False)
    write(folder, hf, {QUERY: 4, DOWN: 4, QKV: 4})
    stored, at = load_file(folder / "adapter_model.safetensors"), "base_model.model."
    stored[f"{at}{QUERY}.lora_A.weight"] = torch.zeros(4, 47)
    del stored[f"{at}{DOWN}.lora_B.weight"]
    stored[f"{at}{QKV}.lora_magnitude_vector"] = torch.zeros(96)
    stored[f"{at}model.language_model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 48)
    stored[f"{at}{HEAD}.weight"] = torch.zeros(130, 48)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as told:
        HookedVLM.from_pretrained(base, lora=folder)
    text = str(told.value)
    assert "does not fit (5 entries)" in text
    for part in (
        f"{QUERY}.lora_A.weight: wanted a product of [48, 48], found [48, 4] times [4, 47]",
        f"{DOWN}.lora_A.weight: wanted a product of [48, 96], found no lora_B",
        "lora_magnitude_vector is not part of standard LoRA",
        "Qwen2_5_VLForConditionalGeneration has no model.language_model.layers.7.mlp.up_proj.weight",
        "lm_head.weight: wanted [128, 48], found [130, 48]",
    ):
        assert part in text, part


def test_head_that_is_tied_cannot_be_tuned_alone(tmp_path: Path) -> None:
    hf, base = tiny.save(TIED, tmp_path / "base", with_processor=False)
    write(tmp_path / "lora", hf, {HEAD: 4})
    with pytest.raises(ValueError, match=r"has no lm_head.weight \(it is tied to the embedding\)"):
        HookedVLM.from_pretrained(base, lora=tmp_path / "lora")


def test_folders_that_hold_no_adapter_are_told_of(tmp_path: Path) -> None:
    _, base = tiny.save(CASE, tmp_path / "base", with_processor=False)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json; pass the folder that peft"):
        HookedVLM.from_pretrained(base, lora=base)
    with pytest.raises(FileNotFoundError, match=r"No LoRA adapter '.*nowhere': it is neither a folder"):
        HookedVLM.from_pretrained(base, lora=tmp_path / "nowhere")
    empty = tmp_path / "lora"
    empty.mkdir()
    (empty / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match=r"has no weights \(adapter_model.safetensors or adapter_model.bin\)"):
        HookedVLM.from_pretrained(base, lora=empty)
    with pytest.raises(ValueError, match="does not name its base model"):
        HookedVLM.from_pretrained(empty)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_merged_adapter_equals_peft(rank_stabilised: bool, tmp_path: Path) -> None:
    """Trained, saved and merged by peft itself."""
    peft = pytest.importorskip("peft")
    _hf, base = tiny.save(CASE, tmp_path / "base", torch.float64, with_processor=False)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=rank_stabilised,
        target_modules=["q_proj", "down_proj", "qkv", "mlp.2"],
        alpha_pattern={"down_proj": 2},
        rank_pattern={"qkv": 5},
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(build_hf(CASE), config)
    with torch.no_grad():
        tuned.base_model.model.lm_head.modules_to_save.default.weight.mul_(1.5)
    tuned.save_pretrained(tmp_path / "lora")
    agree(HookedVLM.from_pretrained(base, lora=tmp_path / "lora"), tuned.merge_and_unload())


@pytest.mark.filterwarnings("ignore")
def test_adapter_on_packed_weights_is_merged_into_their_numbers(tmp_path: Path) -> None:
    """What it tunes is then held as numbers; the rest stays packed."""
    if find_spec("torchao") is None:
        pytest.skip("needs torchao")
    from tests.checkpoints.test_quantised import packed

    folder = packed(CASE, "torchao 8", tmp_path)
    plain: Any = HookedVLM.from_pretrained(folder)
    made = write(tmp_path / "lora", build_hf(CASE), {QUERY: 4, QKV: 4})
    ours: Any = HookedVLM.from_pretrained(folder, lora=tmp_path / "lora")
    for mine, base, module, rows in (
        (ours.blocks[1].attn.q, plain.blocks[1].attn.q, QUERY, slice(0, 48)),
        (ours.vision.blocks[0].attn.k, plain.vision.blocks[0].attn.k, QKV, slice(32, 64)),
    ):
        down, up = made[module]
        assert torch.allclose(mine.weight, base.weight + 3.0 * (up @ down)[rows], atol=1e-6)
        assert type(mine) is torch.nn.Linear and type(base) is not torch.nn.Linear
    assert type(ours.blocks[1].attn.k) is type(plain.blocks[1].attn.k)
