"""Path patching against its textbook form (freeze everything, record, patch) and against direct attribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.circuits.runs import KINDS, LLAVA, NEXT, QWEN3, TEXT, difference, pair_of
from veena_lens.circuits.paths import path_patching
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import project

EXACT: dict[str, Any] = dict(rtol=1e-9, atol=1e-11)


@torch.no_grad()
def textbook(
    model: Any, clean: Any, corrupted: Any, sender: tuple[int, int], receivers: list[tuple[str, int]]
) -> float:
    """Path patching of one head by two whole runs: all components frozen, each receiver's values recorded; then the
    corrupted run with those values put in."""
    layer, head = sender
    n = model.cfg.n_layers
    outs = [f"blocks.{i}.{part}" for i in range(n) for part in ("attn.hook_z", "hook_mlp_out")]
    (_, a), (plain, b) = (model.run_with_cache(x, names_filter=outs) for x in (clean, corrupted))
    recorded: dict[str, torch.Tensor] = {}

    def freeze(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        out = b[hook.name].clone()
        if hook.name == f"blocks.{layer}.attn.hook_z":
            out[:, :, head] = a[hook.name][:, :, head]
        return out

    def record(tensor: torch.Tensor, hook: Any) -> None:
        recorded[hook.name] = tensor.clone()

    def put(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        out = tensor.clone()
        for name, copy in receivers:
            if name == hook.name:
                out[:, :, copy] = recorded[name][:, :, copy]
        return out

    names = list(dict.fromkeys(name for name, _ in receivers))
    model.run_with_hooks(corrupted, fwd_hooks=[(x, freeze) for x in outs] + [(x, record) for x in names])
    patched = model.run_with_hooks(corrupted, fwd_hooks=[(x, put) for x in names])
    return float(difference(patched[:, -1])[0] - difference(plain[:, -1])[0])


@pytest.mark.parametrize("name", [LLAVA, QWEN3, TEXT, "text-llama-bias", "text-qwen2-window"])
def test_paths_equal_freezing_every_other_component(name: str, model_of) -> None:
    model, clean, corrupted = pair_of(model_of, name)
    a, b = clean[0].without_padding(), corrupted[0].without_padding()
    last, groups = model.cfg.n_layers - 1, model.cfg.n_heads // model.cfg.n_key_value_heads
    head = model.cfg.n_heads - 1
    receivers: list[Any] = [f"L{last}H{head}.{x}" for x in "qkv"] + [f"L{last}H{head}"]
    inner = {x: (f"blocks.{last}.attn.hook_{x}", head if x == "q" else head // groups) for x in "qkv"}
    wanted = [[inner["q"]], [inner["k"]], [inner["v"]], list(inner.values())]
    if last > 1:  # receivers in two layers, the first of which the second must not hear
        receivers.append(("L1H0.v", f"L{last}H{head}.k"))
        wanted.append([("blocks.1.attn.hook_v", 0), inner["k"]])
    found = path_patching(model, a, b, ["L0H0", "L0H3"], receivers, difference, max_rows=3)
    assert found.axes == ("pair", "sender", "receiver") and found.mask is None
    truth = [[textbook(model, a, b, (0, h), r) for r in wanted] for h in (0, 3)]
    torch.testing.assert_close(found.values[0], torch.tensor(truth, dtype=torch.float64), **EXACT)
    assert float(found.values.abs().min()) > 1e-9


@pytest.mark.parametrize("name", [LLAVA, QWEN3])
def test_path_to_an_mlp_equals_its_own_formula(name: str, model_of) -> None:
    """MLP 1 reads ln2(resid_mid + change); what comes out is put into the corrupted run."""
    model, clean, corrupted = pair_of(model_of, name)
    a, b = clean[0].without_padding(), corrupted[0].without_padding()
    block = model.blocks[1]
    with torch.no_grad():
        (_, ca), (plain, cb) = (model.run_with_cache(x) for x in (a, b))
        truth = []
        for change in (
            ca["embed"] - cb["embed"],
            ca["blocks.0.hook_mlp_out"] - cb["blocks.0.hook_mlp_out"],
            (ca["z", 1] - cb["z", 1])[:, :, 2] @ block.attn.W_O[2],
            (ca["post", 0] - cb["post", 0])[:, :, 7, None] * model.blocks[0].mlp.W_out[7],
        ):
            out = block.mlp(block.ln2(cb["resid_mid", 1] + change))
            patched = model.run_with_hooks(b, fwd_hooks=[("blocks.1.hook_mlp_out", lambda t, hook, out=out: out)])
            truth.append(float(difference(patched[:, -1]) - difference(plain[:, -1])))
    found = path_patching(model, a, b, ["embed", "0_mlp_out", "L1H2", "L0N7"], "1_mlp_in", difference)
    torch.testing.assert_close(found.values[0, :, 0], torch.tensor(truth, dtype=torch.float64), **EXACT)


ENDS = [(name, "denoising") for name in (*KINDS, NEXT, "qwen3_vl-deepstack-of-one-layer")]


@pytest.mark.parametrize(("name", "direction"), [*ENDS, (LLAVA, "noising")])
def test_paths_to_the_end_are_direct_attribution(name: str, direction: str, model_of) -> None:
    """With B's scale each entry is Delta / scale * weight read by the unembedding, and all of them add up to the whole
    change; with the real scale they are the logits of the shifted residual."""
    model, clean, corrupted = pair_of(model_of, name)
    kw: dict[str, Any] = dict(metric=difference, direction=direction)
    frozen = path_patching(model, clean, corrupted, "components", norm="frozen", **kw)
    heads = path_patching(model, clean, corrupted, "heads", norm="frozen", **kw)
    real = path_patching(model, clean, corrupted, "components", **kw)
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    sign = 1 if direction == "denoising" else -1
    read = model.unembed.matrix[5] - model.unembed.matrix[6]
    layers = range(model.cfg.n_layers)
    names = [f"blocks.{layer}.hook_{part}" for layer in layers for part in ("attn_out", "mlp_out", "resid_post")]
    for i in range(len(base)):
        with torch.no_grad():
            filters = [*names, "hook_embed", "ln_final.hook_scale"]
            _, here = model.run_with_cache(base[i].without_padding(), names_filter=filters)
            _, there = model.run_with_cache(source[i].without_padding(), names_filter=filters)
        scale = here["ln_final.hook_scale"][0, -1]
        for k, label in enumerate(frozen.labels["sender"]):
            if label.endswith("deepstack"):
                continue  # nothing joins at the last position
            layer, _, part = label.partition("_")
            hook = "hook_embed" if label == "embed" else f"blocks.{layer}.hook_{part}"
            change = there[hook][0, -1] - here[hook][0, -1]
            push = sign * (change / scale * model.ln_final.w) @ read
            torch.testing.assert_close(frozen.values[i, k, 0], push.detach(), **EXACT)
            end = here[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][0, -1]
            with torch.no_grad():
                moved = model.unembed(model.ln_final((end + change)[None, None]))[:, 0]
                unmoved = model.unembed(model.ln_final(end[None, None]))[:, 0]
            shifted = sign * (difference(moved) - difference(unmoved))[0]
            torch.testing.assert_close(real.values[i, k, 0], shifted, **EXACT)
        whole = there[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][0, -1] - end
        total = sign * (whole / scale * model.ln_final.w) @ read
        torch.testing.assert_close(frozen.values[i, :, 0].sum(), total.detach(), **EXACT)
    attention = [k for k, x in enumerate(frozen.labels["sender"]) if x.endswith("attn_out")]
    torch.testing.assert_close(heads.values.sum(1), frozen.values[:, attention].sum(1), **EXACT)
    assert float(real.values.abs().max()) > 1e-4


def test_senders_joined_add_up_and_paths_that_do_not_exist_are_masked(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, QWEN3)
    senders = ["0_attn_out", tuple(f"L0H{h}" for h in range(4)), "L1H0"]
    joined = path_patching(model, clean, corrupted, senders, ["L1H2.v", "1_mlp_in"], difference)
    torch.testing.assert_close(joined.values[:, 0], joined.values[:, 1], **EXACT)
    assert joined.exists[0].tolist() == [[True, True], [True, True], [False, True]]
    assert joined.labels["sender"][1] == "L0H0 + L0H1 + L0H2 + L0H3"
    assert float(joined.values[joined.exists].abs().min()) > 1e-9 and not joined.values[~joined.exists].any()


def test_deepstack_features_are_frozen_and_can_send(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, QWEN3)
    a, b = clean[0].without_padding(), corrupted[0].without_padding()
    found = path_patching(model, a, b, ["embed", "1_deepstack", ("embed", "1_deepstack")], ["L1H0.q"], difference)
    with torch.no_grad():
        _, ca = model.run_with_cache(a)
        plain, cb = model.run_with_cache(b)
        steps = [ca["embed"] - cb["embed"]]
        inner = ca["deepstack.0.hook_out"] - cb["deepstack.0.hook_out"]
        steps.append(model.scatter_deepstack(inner, b))
        truth = []
        for change in (*steps, steps[0] + steps[1]):
            normed = model.blocks[1].ln1(cb["blocks.1.hook_deepstack"] + change)
            q = (model.blocks[1].attn.q(normed)).unflatten(-1, (4, 16))[:, :, 0]

            def put(tensor: torch.Tensor, hook: Any, q: torch.Tensor = q) -> torch.Tensor:
                out = tensor.clone()
                out[:, :, 0] = q
                return out

            patched = model.run_with_hooks(b, fwd_hooks=[("blocks.1.attn.hook_q", put)])
            truth.append(float(difference(patched[:, -1]) - difference(plain[:, -1])))
    torch.testing.assert_close(found.values[0, :, 0], torch.tensor(truth, dtype=torch.float64), **EXACT)
    assert len({round(x, 12) for x in truth}) == 3


def test_everything_a_layer_reads_gives_what_patching_its_input_gives(model_of) -> None:
    """All senders to every head of the next layer: their normed input is patched, as patch_sweep does it."""
    model, clean, corrupted = pair_of(model_of, LLAVA)
    senders, receivers = [("embed", "0_attn_out", "0_mlp_out")], [tuple(f"L1H{h}" for h in range(6))]
    whole = path_patching(model, clean[0], corrupted[0], senders, receivers, difference)
    site = ["blocks.1.ln1.hook_normalized"]
    swept = patch_sweep(model, clean[0], corrupted[0], site, "all", difference, progress=False)
    torch.testing.assert_close(whole.values[0, 0], swept.values - swept.corrupted, **EXACT)


def test_pairs_are_kept_apart_and_a_run_with_itself_gives_nothing(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    kw: dict[str, Any] = dict(senders=["L0H1", "embed"], receivers=["L1H0", "final"], metric=difference)
    together = path_patching(model, clean, corrupted, **kw)
    for i in range(3):
        alone = path_patching(model, clean[i].without_padding(), corrupted[i].without_padding(), **kw)
        torch.testing.assert_close(together.values[i], alone.values[0], **EXACT)
    assert float(path_patching(model, clean, clean, **kw).values.abs().max()) < 1e-14
    share = path_patching(model, clean, corrupted, relative=True, **kw)
    gap = torch.tensor(share.meta["clean"]) - torch.tensor(share.meta["corrupted"])
    torch.testing.assert_close(share.values * gap[:, None, None].double(), together.values, rtol=1e-6, atol=1e-9)


def test_a_metric_inside_reads_the_receivers_own_output(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    direction = torch.randn(48, dtype=torch.float64)
    metric = project("blocks.1.hook_attn_out", direction)
    found = path_patching(model, clean[0], corrupted[0], ["0_mlp_out"], ["L1H2.v", "L1H3.q"], metric)
    assert float(found.values.abs().min()) > 1e-9
    with pytest.raises(ValueError, match="lies after"):
        path_patching(model, clean[0], corrupted[0], ["0_mlp_out"], ["final"], metric)


def test_a_planted_path_is_the_only_one_found(model_of) -> None:
    """Queries of layer 1's head 0 read one direction only, and only head 4 of layer 0 writes it."""
    from tests.cases import BY_NAME, build_hf
    from veena_lens import HookedVLM

    model = HookedVLM.from_hf(build_hf(BY_NAME["text-llama-bias"]), casts="none")
    _, clean, corrupted = pair_of(model_of, "text-llama-bias")
    clean, corrupted = clean[:1], corrupted[:1]
    with torch.no_grad():
        axis = torch.zeros(48, dtype=torch.float64)
        axis[3] = 1
        model.blocks[0].attn.W_O[..., 3] = 0
        model.blocks[0].attn.W_O[4, :, 3] = 1
        model.embed.weight[:, 3] = 0
        model.embed.weight[:, 0] = 30  # rules the norm, and nobody else writes it: no sender moves the scale
        model.blocks[0].attn.W_O[..., 0] = 0
        model.blocks[0].mlp.down.weight[3] = 0
        weight = model.blocks[1].attn.q.weight.view(6, 8, 48)
        weight[0, :, torch.arange(48) != 3] = 0
        weight[0, :, 3] = 9
    found = path_patching(model, clean, corrupted, "heads", ["L1H0.q"], difference)
    effects = found.select(receiver="L1H0.q").values[0].abs()
    assert int(effects.argmax()) == 4 and float(effects[4]) > 10 * float(effects[:6].sum() - effects[4])


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(senders=["L0X1"]), "L0X1"),
        (dict(senders=[]), "at least one"),
        (dict(senders=["L9H0"]), "layer 9"),
        (dict(senders=["L0H6"]), "head 6"),
        (dict(senders=["L0N96"]), "neuron 96"),
        (dict(senders=["1_deepstack"]), "deep-stack"),
        (dict(receivers=["L1H0.z"]), "L1H0.z"),
        (dict(receivers=["2_mlp_in"]), "layer 2"),
        (dict(receivers=[("final", "1_mlp_in")]), "alone"),
        (dict(receivers=["L1H0.q"], norm="frozen"), "frozen"),
        (dict(norm="fixed"), "norm="),
        (dict(positions=[0]), "last position"),
        (dict(positions="lats"), "lats"),
        (dict(metric=None), "metric="),
        (dict(metric=lambda logits: logits.sum()), "one number per row"),
        (dict(metric=lambda logits: logits[:, 0] / 0), "not finite"),
        (dict(direction="up"), "denoising"),
        (dict(max_rows=0), "max_rows"),
    ],
)
def test_what_does_not_fit_is_refused(kw: dict[str, Any], telling: str, model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    with pytest.raises(ValueError, match=telling):
        path_patching(model, clean, corrupted, **({"metric": difference} | kw))
    with pytest.raises(ValueError, match="one to one"):
        path_patching(model, clean[[0, 1]], corrupted[[1, 0]], metric=difference)
