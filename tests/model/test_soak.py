"""Random calls of the public interface, with exceptions in their midst: whatever comes, the model is as it was.

`VEENA_LENS_SOAK=10000 pytest tests/model/test_soak.py` makes so many calls.
"""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, counted, native_model, raw_inputs
from veena_lens import HookedVLM
from veena_lens.interventions import (
    Ablate,
    BoostAttention,
    KnockOutAttention,
    Patch,
    ScaleNeurons,
    Steer,
    SteerKeepingNorm,
    SuppressHeads,
)
from veena_lens.sweeps import generation_sweep, patch_sweep, steer_sweep

CALLS = int(os.environ.get("VEENA_LENS_SOAK", "250"))
CASES = ("clip-llama", "qwen2_vl-plain", "gemma3-plain")


class Broken(Exception):
    """What a user's hook raises."""


class Soak:
    """One model under random calls, each a method named `call_...`."""

    def __init__(self, case: str, seed: int) -> None:
        self.draw = random.Random(seed)
        raw = raw_inputs(BY_NAME[case])
        self.model: HookedVLM = native_model(BY_NAME[case], casts="none")
        self.inputs = self.model.inputs_from_hf(**(raw if "mm_token_type_ids" in raw else counted(raw)))
        self.n_layers = self.model.cfg.n_layers
        with torch.no_grad():
            self.plain, self.cache = self.model.run_with_cache(self.inputs)
        self.names = [name for name in self.cache if name.startswith("blocks.") or name.startswith("vision.")]
        self.done: Counter[str] = Counter()

    # --- what calls are made of -----------------------------------------------------------------------
    def rows(self) -> Any:
        n = len(self.inputs)
        return self.inputs[sorted(self.draw.sample(range(n), self.draw.randint(1, n)))]

    def vector(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.draw.randint(0, 999))
        return torch.randn(self.model.cfg.d_model, generator=generator, dtype=torch.float64)

    def intervention(self) -> Any:
        draw, cfg, layer = self.draw, self.model.cfg, self.draw.randrange(self.n_layers)
        where = draw.choice(["last", "all", "text", "image", -1, 0, slice(0, 2)])
        heads = draw.choice([None, [draw.randrange(cfg.n_heads)]])
        keys = draw.choice(["image", "text", "all", 0])
        return draw.choice([
            lambda: Steer(layer, self.vector(), draw.uniform(-3, 3), positions=where),
            lambda: SteerKeepingNorm(layer, self.vector(), 1.0, positions=where),
            lambda: Ablate(f"blocks.{layer}.hook_mlp_out", positions=where),
            lambda: ScaleNeurons(layer, [draw.randrange(cfg.d_mlp)], factor=draw.uniform(0, 4), positions=where),
            lambda: BoostAttention(layer, heads=heads, keys=keys, factor=draw.uniform(0.1, 5)),
            lambda: BoostAttention(layer, heads=heads, keys=keys, factor=2.0, mode=draw.choice(["mul", "abs"])),
            lambda: KnockOutAttention(layer, heads=heads, keys=draw.choice(["image", 0])),
            lambda: SuppressHeads(layer, heads=[draw.randrange(cfg.n_heads)]),
            lambda: Steer(self.n_layers, self.vector()),  # no such layer
            lambda: Steer(layer, self.vector()[:-1]),  # of another width
            lambda: BoostAttention(layer, heads=[cfg.n_heads]),
            lambda: Ablate("blocks.0.hook_nothing"),
            lambda: Patch(f"blocks.{layer}.hook_attn_out", torch.zeros(9, 9, 9)),
        ])()  # fmt: skip

    def hook(self, kinds: tuple[str, ...] = ("reads", "edits", "in place", "breaks", "no hook")) -> tuple[Any, Any]:
        kind = self.draw.choice(kinds)

        def act(tensor: torch.Tensor, hook: Any) -> Any:
            if kind == "breaks":
                raise Broken
            if kind == "in place":
                tensor.mul_(0.5)
            return 2 * tensor if kind == "edits" else None

        name = "blocks.0.hook_absent" if kind == "no hook" else self.draw.choice(self.names)
        return (name if self.draw.random() < 0.7 else lambda n: n == name), act

    def maybe_broken(self) -> None:
        if self.draw.random() < 0.3:
            raise Broken

    # --- calls ------------------------------------------------------------------------------------------
    def call_forward(self) -> None:
        self.model(self.rows(), return_type=self.draw.choice(["logits", "loss", "both", None]))

    def call_cache(self) -> None:
        wanted = self.draw.choice([None, self.draw.sample(self.names, 3), lambda n: "resid" in n, "blocks.9.hook_no"])
        more: dict[str, Any] = self.draw.choice([{}, {"device": "cpu"}, {"pos_slice": -1}, {"remove_batch_dim": True}])
        self.model.run_with_cache(self.rows(), names_filter=wanted, **more)

    def call_hooks(self) -> None:
        self.model.run_with_hooks(self.rows(), fwd_hooks=[self.hook() for _ in range(self.draw.randint(1, 3))])

    def call_blocks(self) -> None:
        """Nest contexts, run inside, and leave them in order or by an exception."""
        with ExitStack() as stack:
            for _ in range(self.draw.randint(1, 3)):
                one = self.draw.choice([
                    lambda: self.model.intervene([self.intervention()]),
                    lambda: self.model.hooks([self.hook()]),
                    lambda: self.model.record_attention(queries="last", keys="image"),
                    lambda: self.model.without_interventions(),
                ])  # fmt: skip
                stack.enter_context(one())
            self.maybe_broken()
            self.model(self.rows())
            self.maybe_broken()

    def call_per_row(self) -> None:
        rows = self.rows()
        with self.model.intervene(per_row=[[self.intervention()] for _ in range(len(rows))]):
            self.model(rows)
            self.maybe_broken()

    def call_generate(self) -> None:
        with self.model.intervene([self.intervention() for _ in range(self.draw.randint(0, 2))]):
            tokens = self.draw.randint(1, 3)
            cached = self.draw.random() < 0.7
            self.model.generate(self.rows(), max_new_tokens=tokens, return_type="tokens", use_past_kv_cache=cached)

    def call_permanent(self) -> None:
        try:
            self.model.add_hook(*self.hook())
            self.model(self.rows())
        finally:
            self.model.reset_hooks()

    def call_gradients(self) -> None:
        with torch.enable_grad(), self.model.hooks(bwd_hooks=[self.hook(("reads", "breaks"))]):
            self.model(self.rows())[:, -1].sum().backward()
        self.model.zero_grad()

    def call_attention(self) -> None:
        self.model.attention(self.rows(), queries=self.draw.choice(["last", 0, "nowhere"]))

    def call_sweep(self) -> None:
        row = self.inputs[self.draw.randrange(len(self.inputs))]
        metric = self.draw.choice([lambda logits: logits[:, 5], lambda logits: logits, lambda logits: logits[:, 10**6]])
        kw: dict[str, Any] = dict(metric=metric, progress=False, max_rows=4)
        self.draw.choice([
            lambda: patch_sweep(self.model, row, row, sites="attn_out", **kw),
            lambda: steer_sweep(self.model, row, self.vector(), alphas=[1.0], **kw),
            lambda: generation_sweep(self.model, row, [[], [self.intervention()]], max_new_tokens=2, progress=False),
        ])()  # fmt: skip

    # --- what must hold -----------------------------------------------------------------------------------
    def once(self, check: bool) -> None:
        name = self.draw.choice([name for name in dir(self) if name.startswith("call_")])
        with torch.set_grad_enabled(False):
            try:
                getattr(self, name)()
                self.done[name] += 1
            except (Broken, ValueError, TypeError, IndexError) as error:
                assert isinstance(error, Broken) or str(error), f"{name}: an error without a word"
                self.done["refused or broken"] += 1
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        left = [name for name, m in self.model.named_modules() for kind in kinds if getattr(m, kind)]
        assert not left and self.model.is_untouched and not self.model.interventions, (name, left)
        if check:
            with torch.no_grad():
                assert torch.equal(self.model(self.inputs), self.plain), f"{name} left a trace"


@pytest.mark.parametrize("case", CASES)
def test_random_calls_leave_the_model_as_it_was(case: str) -> None:
    soak, n = Soak(case, seed=CALLS), max(20, CALLS // len(CASES))
    kept: list[int] = []
    for i in range(n):
        soak.once(check=i % 5 == 0)
        if i in (n // 3, n - 1):
            gc.collect()
            kept.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert kept[1] <= kept[0] + 20, f"tensors alive: {kept[0]} after a third of the calls, {kept[1]} at the end"
    assert len(soak.done) >= 9 and soak.done["refused or broken"] < n, soak.done
