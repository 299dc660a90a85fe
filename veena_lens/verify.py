"""The parity certificate: one checkpoint, compared with Hugging Face's model on the same inputs.

It compares logits with images, a left-padded batch, the batch with its rows alone, and decoding with and without a
cache, and edits every hook point. The reference runs with sdpa, whose softmax stays in the dtype of the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.checkpoints.finite import dtype_of
from veena_lens.checkpoints.loading import Checkpoint, open_checkpoint
from veena_lens.config import HookedVLMConfig
from veena_lens.hook_table import hooks_of, layer_of
from veena_lens.images.layout import layout_of
from veena_lens.inputs import MultimodalInputs, find_spans, text_positions
from veena_lens.model.model import HookedVLM

# Largest difference allowed, relative to the largest logit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Where shapes differ (a row of a batch, a cached step) kernels round differently, and in float64 the rounding of
# norms to float32, which is Hugging Face's, turns 1e-16 into 1e-8 now and then.
TOLERANCE_OTHER_SHAPES = TOLERANCE | {torch.float64: 1e-7}
N_NEW = 16
QUESTIONS = ("What is in the picture?", "Describe what you see, in a few words and without any guess.")
STATEMENTS = ("What is a cat?", "Describe a day at the sea, in a few words and without any guess.")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the certificate: the largest relative difference, and what is allowed."""

    name: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # a NaN does not pass


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What `verify` found; it prints as a table. `dead_hooks` names the points whose edit changed nothing."""

    model: str
    architecture: str
    dtype: str
    device: str
    versions: str
    checks: tuple[Check, ...]
    n_hooks: int
    dead_hooks: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks) and not self.dead_hooks

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.checks)
        lines = [
            f"{self.model}: {self.architecture}, {self.dtype} on {self.device}; {self.versions}",
            "",
            f"{'check':<{width}}  largest difference  allowed",
        ]
        for c in self.checks:
            verdict = "ok" if c.passed else "FAILED"
            lines.append(f"{c.name:<{width}}  {c.error:>18.1e}  {c.allowed:>7.0e}  {verdict}  {c.note}".rstrip())
        acting = self.n_hooks - len(self.dead_hooks)
        lines.append(f"{'hook points that act when edited':<{width}}  {acting:>11} of {self.n_hooks}")
        if self.dead_hooks:
            lines.append(f"  FAILED: {', '.join(self.dead_hooks[:8])}{', ...' if len(self.dead_hooks) > 8 else ''}")
        return "\n".join([*lines, "", "passed" if self.passed else "FAILED"])

    __repr__ = __str__


@torch.no_grad()
def verify(
    model: HookedVLM,
    path: str,
    *,
    dtype: torch.dtype | str | None = None,
    images: Sequence[Any] | None = None,
    progress: bool = True,
) -> Certificate:
    """Compare a loaded model with Hugging Face's model of the same checkpoint.

    Args:
        model: the loaded model.
        path: the checkpoint's name, folder or hub id.
        dtype: of the comparison, or its name; None takes the model's.
        images: two images or more to compare on, instead of drawn ones.
        progress: whether to show a progress bar over the hook points.

    Raises:
        ValueError: the model has another dtype, or does not round as Hugging Face does.
    """
    import transformers

    dtype = dtype_of(dtype) or model.cfg.dtype
    if dtype != model.cfg.dtype or dtype not in TOLERANCE:
        known = ", ".join(str(d).removeprefix("torch.") for d in TOLERANCE)
        raise ValueError(f"verify: the model is {model.cfg.dtype}, asked for {dtype}; load it in one of: {known}.")
    if model.cfg.casts != "hf":
        raise ValueError("verify compares with Hugging Face, so the model must be loaded with casts='hf'.")
    theirs = load_reference(open_checkpoint(path), dtype, model.cfg.device)
    batch = probe(model, images)
    rows = [alone(batch[i]) for i in range(len(batch))]
    checks = [
        *_logits(model, theirs, batch, rows, dtype),
        *_decoding(model, theirs, batch, dtype),
    ]
    dead = dead_hooks(model, rows[0], TOLERANCE[dtype], progress)
    return Certificate(
        model=str(path),
        architecture=model.cfg.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=str(model.cfg.device),
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
        checks=tuple(checks),
        n_hooks=len(hooks_of(model.cfg)),
        dead_hooks=dead,
    )


def load_reference(checkpoint: Checkpoint, dtype: torch.dtype, device: Any) -> Any:
    """Return Hugging Face's model of a checkpoint, ready to compare with."""
    import transformers

    kind = transformers.AutoModelForCausalLM
    if checkpoint.cfg.vision is not None:
        kind = transformers.AutoModelForImageTextToText
    where = checkpoint.hub_id or str(checkpoint.path)
    theirs = kind.from_pretrained(
        where, revision=checkpoint.revision, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    theirs.generation_config = transformers.GenerationConfig(do_sample=False)  # plain greedy, whatever the folder says
    return theirs.to(device).eval()


def probe(model: HookedVLM, images: Sequence[Any] | None = None) -> MultimodalInputs:
    """Return a left-padded batch: two rows of unequal length, with images if the model takes them.

    Args:
        model: the model to probe.
        images: two images or more; None draws them.
    """
    takes_images = model.cfg.vision is not None
    if model.processor is None or (takes_images and not hasattr(model.processor, "image_processor")):
        return _drawn_tokens(model)
    texts = list(QUESTIONS if takes_images else STATEMENTS)
    chat = any(getattr(p, "chat_template", None) for p in (model.processor, model.tokenizer))
    rows: list[list[Any]] | None = None
    if takes_images:
        given = list(images) if images is not None else _drawn_images()
        if len(given) < 2:
            raise ValueError(f"verify needs two images or more, not {len(given)}.")
        rows = [[given[0]], given[1:]]
        if not chat:
            texts = [_placeholders(model.processor, len(p)) + t for t, p in zip(texts, rows, strict=True)]
    return model.prepare(texts, rows, chat=chat)


def _placeholders(processor: Any, n: int) -> str:
    """Return the image tokens of a raw prompt, numbered: Hugging Face's Qwen models take images that touch for one."""
    return "".join(f"{i + 1}: {processor.image_token} " for i in range(n))


def _drawn_images() -> list[Any]:
    """Return three images of unequal shape, noise on a gradient."""
    from PIL import Image

    out = []
    for seed, (width, height) in enumerate([(320, 240), (200, 300), (256, 256)]):
        generator = torch.Generator().manual_seed(seed)
        ramp = torch.linspace(0, 160, width).expand(3, height, width)
        pixels = (ramp + 95 * torch.rand(3, height, width, generator=generator)).to(torch.uint8)
        out.append(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
    return out


def _drawn_tokens(model: HookedVLM) -> MultimodalInputs:
    """Return the batch of `probe` for a checkpoint without a processor: drawn token ids and pixels."""
    cfg, generator = model.cfg, torch.Generator().manual_seed(0)
    counts, texts = ((1, 2), ((3, 5), (2, 9))) if cfg.vision is not None else ((0, 0), ((3, 5), (2, 9)))
    given, lengths = layout_of(cfg).draw(counts, generator) if cfg.vision is not None else ({}, [])
    rows, high, left = [], min(cfg.d_vocab, *cfg.image_token_ids, cfg.d_vocab), iter(lengths)
    for n_images, (before, after) in zip(counts, texts, strict=True):
        parts = [torch.randint(3, high, (before,), generator=generator)]
        for _ in range(n_images):
            image = torch.full((next(left),), cfg.image_token_ids[0])
            parts += [image, torch.randint(3, high, (2,), generator=generator)]
        rows.append(torch.cat([*parts, torch.randint(3, high, (after,), generator=generator)]))
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(length - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([torch.arange(length) >= length - len(r) for r in rows])
    if cfg.bidirectional_images:
        given["token_type_ids"] = (ids == cfg.image_token_id).long()
    inputs = model.inputs_from_hf(input_ids=ids, attention_mask=mask, **given)
    return (
        inputs if inputs.position_ids.ndim == 3 else replace(inputs, position_ids=text_positions(inputs.attention_mask))
    )


def alone(row: MultimodalInputs) -> MultimodalInputs:
    """Return one row of a batch without its pads."""
    keep = row.attention_mask[0]
    tokens, mask = row.tokens[:, keep], row.attention_mask[:, keep]
    lengths = [row.count_image_tokens(0, span) for span in row.spans[0].images]
    spans = find_spans(tokens, mask, row.image_token_ids, [lengths])
    return replace(row, tokens=tokens, attention_mask=mask, position_ids=row.position_ids[..., keep], spans=spans)


def as_hf(cfg: HookedVLMConfig, inputs: MultimodalInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that Hugging Face's model takes for the same inputs.

    Args:
        cfg: the model's configuration.
        inputs: what our model runs on.
        dtype: of the pixels.
    """
    given = dict(input_ids=inputs.tokens, attention_mask=inputs.attention_mask.long(), position_ids=inputs.position_ids)
    if inputs.pixel_values is None:
        return given
    given |= layout_of(cfg).as_hf(inputs, inputs.pixel_values.to(dtype))
    if cfg.bidirectional_images:
        given["token_type_ids"] = inputs.image_mask.long()
    return given


def relative_difference(ours: Float[Tensor, "*any"], theirs: Float[Tensor, "*any"]) -> float:
    """Return max |a - b| / max |b|."""
    a, b = ours.double(), theirs.double().to(ours.device)
    return float((a - b).abs().max() / b.abs().max())


def _largest(errors: Sequence[float]) -> float:
    """Return the maximum; a NaN remains one (the built-in `max` may lose it)."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _logits(
    model: HookedVLM, theirs: Any, batch: MultimodalInputs, rows: Sequence[MultimodalInputs], dtype: torch.dtype
) -> Iterator[Check]:
    """Compare single rows and the padded batch with Hugging Face, and with each other."""
    exact, loose = TOLERANCE[dtype], TOLERANCE_OTHER_SHAPES[dtype]
    what = "logits with images" if batch.pixel_values is not None else "logits"
    single = [model(row) for row in rows]
    errors = [
        relative_difference(ours, theirs(**as_hf(model.cfg, row, dtype)).logits)
        for ours, row in zip(single, rows, strict=True)
    ]
    yield Check(name=f"{what}, against Hugging Face", error=_largest(errors), allowed=exact)
    padded, keep = model(batch), batch.attention_mask
    reference = theirs(**as_hf(model.cfg, batch, dtype)).logits
    error = relative_difference(padded[keep], reference[keep.to(reference.device)])
    yield Check(name="left-padded batch, against Hugging Face", error=error, allowed=exact)
    errors = [relative_difference(padded[i, keep[i]], single[i][0]) for i in range(len(rows))]
    yield Check(name="row of a padded batch, against the row alone", error=_largest(errors), allowed=loose)


def _decoding(model: HookedVLM, theirs: Any, batch: MultimodalInputs, dtype: torch.dtype) -> Iterator[Check]:
    """Compare greedy tokens, ours with a cache and Hugging Face's, by our logits without a cache.

    The error is how far below the best token each chosen one lies: 0 unless two tokens are nearly equal.
    """
    n_new = min(N_NEW, model.cfg.n_ctx - batch.shape[1])
    if n_new < 1:
        return
    plain: dict[str, Any] = dict(eos_token_id=[], repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=0)
    cached = model.generate(batch, max_new_tokens=n_new, return_type="tokens", **plain)
    given = as_hf(model.cfg, batch, dtype)
    del given["position_ids"]  # its generate counts them itself, as ours does
    whole = theirs.generate(**given, max_new_tokens=n_new, pad_token_id=batch.pad_token_id)
    reference = whole[:, batch.shape[1] :].to(cached.device)
    loose = TOLERANCE_OTHER_SHAPES[dtype]
    error = _shortfall(model, batch, cached)
    yield Check(name="greedy decoding with a cache, against without", error=error, allowed=loose)
    same = int((cached == reference).sum())
    yield Check(
        name="greedy decoding, against Hugging Face",
        error=_shortfall(model, batch, reference),
        allowed=loose,
        note=f"{same} of {cached.numel()} tokens equal",
    )


def _shortfall(model: HookedVLM, batch: MultimodalInputs, new: Int[Tensor, "batch new"]) -> float:
    """Return the largest distance of a chosen token's logit below the best one, relative to the largest logit."""
    logits = model(batch.with_new_tokens(new))[:, batch.shape[1] - 1 : -1].double()
    chosen = logits.gather(-1, new.to(logits.device)[..., None])[..., 0]
    return float((logits.amax(-1) - chosen).max() / logits.abs().max())


# --- hook points ------------------------------------------------------------------------------------------
@torch.no_grad()
def dead_hooks(model: HookedVLM, inputs: MultimodalInputs, tolerance: float, progress: bool = True) -> tuple[str, ...]:
    """Return the names of hook points where noise as large as the value leaves every logit unchanged.

    Edits of block l start from the residual that enters it, which spares the tower and earlier blocks.

    Args:
        model: the model.
        inputs: what it runs on.
        tolerance: relative differences up to ten times this may be rounding, and are compared with an edit that
            changes no number.
        progress: whether to show a progress bar.
    """
    names = [n for n in hooks_of(model.cfg) if inputs.pixel_values is not None or not _belongs_to_images(n)]
    logits, cache = model.run_with_cache(
        inputs, names_filter=lambda name: name.startswith("blocks.") and name.endswith("hook_resid_pre")
    )
    dead = []
    for name in _shown(names, progress):
        layer = layer_of(name) if name.startswith("blocks.") else None
        if name.startswith(("ln_final", "unembed")):
            layer = model.cfg.n_layers - 1

        def run(hook: Callable[..., Tensor], name: str = name, layer: int | None = layer) -> Tensor:
            if not layer:
                return model.run_with_hooks(inputs, fwd_hooks=[(name, hook)])
            resid = cache[f"blocks.{layer}.hook_resid_pre"]
            return model.run_with_hooks(resid, start_at_layer=layer, tokens=inputs, fwd_hooks=[(name, hook)])

        edited = run(partial(_with_noise, name))
        if relative_difference(edited, logits) > 10 * tolerance:
            continue
        # A small change may be rounding alone: compare with an edit that changes no number.
        if not bool((edited - run(lambda value, hook: value.clone())).abs().max() > 0):
            dead.append(name)
    return tuple(dead)


def _belongs_to_images(name: str) -> bool:
    return name.startswith(("vision.", "connector.", "deepstack.")) or name == "hook_image_features"


def _with_noise(name: str, value: Float[Tensor, "*any"], hook: Any) -> Float[Tensor, "*any"]:
    """Return the value with noise of the value's size; a denominator stays positive, masked scores stay masked."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(value.shape, generator=generator).to(value)
    if name.endswith("hook_scale"):
        return value * (1 + noise)
    finite = value > torch.finfo(value.dtype).min / 2
    size = value[finite].float().pow(2).mean().sqrt().to(value)
    size = torch.where(size > 0, size, torch.ones_like(size))  # a value that happens to be 0 must act as well
    return torch.where(finite, value + (2 * noise - 1) * size, value)


def _shown(names: Sequence[str], progress: bool) -> Any:
    if not progress:
        return names
    from tqdm.auto import tqdm

    return tqdm(names, desc="hook points", leave=False, disable=None)  # None: only in a terminal
