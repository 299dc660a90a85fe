"""The parity certificate: one checkpoint, here and in Hugging Face, compared on the same inputs.

Logits with images, a left-padded batch, batch against single rows, decoding with and without a cache, and
an edit of every hook point. The reference runs with sdpa, whose softmax stays in the dtype of the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veena_lens.checkpoints.loading import Checkpoint, open_checkpoint
from veena_lens.hook_table import hooks_of, layer_of
from veena_lens.images.packing import AMONG_SEVERAL, TILED, layout_of
from veena_lens.images.tiles import tiles_as_hf
from veena_lens.inputs import MultimodalInputs, find_spans, text_positions

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
    """One line of the certificate: a largest relative difference and what is allowed."""

    name: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # a NaN does not pass


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What `verify` found; prints as a table. `dead_hooks` names points whose edit changed nothing."""

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
    model: Any,
    path: str,
    *,
    dtype: torch.dtype | None = None,
    images: Sequence[Any] | None = None,
    progress: bool = True,
) -> Certificate:
    """Compare a loaded model with Hugging Face's own of the same checkpoint (name, folder or hub id).

    dtype: None takes the model's. images: two images or more for the probes instead of drawn ones.
    Raises: ValueError for a model of another dtype, or one that does not round as Hugging Face does."""
    import transformers

    dtype = dtype or model.cfg.dtype
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
    """Hugging Face's model of a checkpoint, ready to compare with."""
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


def probe(model: Any, images: Sequence[Any] | None = None) -> MultimodalInputs:
    """A left-padded batch: two rows of unequal length, with images where the model takes them."""
    has_pictures = model.cfg.vision is not None
    if model.processor is None or (has_pictures and not hasattr(model.processor, "image_processor")):
        return _drawn_tokens(model)
    texts = list(QUESTIONS if has_pictures else STATEMENTS)
    chat = any(getattr(p, "chat_template", None) for p in (model.processor, model.tokenizer))
    pictures: list[list[Any]] | None = None
    if has_pictures:
        given = list(images) if images is not None else _drawn_pictures()
        if len(given) < 2:
            raise ValueError(f"verify needs two images or more, not {len(given)}.")
        pictures = [[given[0]], given[1:]]
        if not chat:
            texts = [_placeholders(model.processor, len(p)) + t for t, p in zip(texts, pictures, strict=True)]
    return model.prepare(texts, pictures, chat=chat)


def _placeholders(processor: Any, n: int) -> str:
    """Image tokens of a raw prompt, numbered: Hugging Face's Qwen models take images that touch for one."""
    return "".join(f"{i + 1}: {processor.image_token} " for i in range(n))


def _drawn_pictures() -> list[Any]:
    """Three images of unequal shape, noise on a gradient."""
    from PIL import Image

    out = []
    for seed, (width, height) in enumerate([(320, 240), (200, 300), (256, 256)]):
        generator = torch.Generator().manual_seed(seed)
        ramp = torch.linspace(0, 160, width).expand(3, height, width)
        pixels = (ramp + 95 * torch.rand(3, height, width, generator=generator)).to(torch.uint8)
        out.append(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
    return out


def _drawn_tokens(model: Any) -> MultimodalInputs:
    """The same for a checkpoint without processor: drawn token ids and pixels."""
    cfg, generator = model.cfg, torch.Generator().manual_seed(0)
    counts, texts = ((1, 2), ((3, 5), (2, 9))) if cfg.vision is not None else ((0, 0), ((3, 5), (2, 9)))
    given, lengths = _drawn_pixels(cfg, counts, generator) if cfg.vision is not None else ({}, [])
    rows, high, left = [], min(cfg.d_vocab, *cfg.image_token_ids, cfg.d_vocab), iter(lengths)
    for n_images, (before, after) in zip(counts, texts, strict=True):
        parts = [torch.randint(3, high, (before,), generator=generator)]
        for _ in range(n_images):
            parts += [torch.full((next(left),), cfg.image_token_id), torch.randint(3, high, (2,), generator=generator)]
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


def _drawn_pixels(cfg: Any, counts: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
    """Noise as a processor of this image layout gives images (`counts` of them a row), and the tokens that each
    fills."""
    vision, n = cfg.vision, sum(counts)
    if cfg.image_layout == "dynamic":
        sides = torch.randint(1, 5, (n, 2), generator=generator) * vision.merge_size
        grids = torch.cat([torch.ones(n, 1, dtype=torch.long), sides], 1)
        pixels = torch.randn(int(grids.prod(-1).sum()), vision.patch_width, generator=generator)
        lengths = (grids.prod(-1) // vision.merge_size**2).tolist()
        return {"pixel_values": pixels, "image_grid_thw": grids}, lengths
    shape = (vision.n_channels, vision.image_size, vision.image_size)
    if cfg.image_layout == "anyres":
        sizes = torch.randint(1, 3 * vision.image_size, (n, 2), generator=generator)
        kinds = [AMONG_SEVERAL if cfg.tiles_single_images_only and c > 1 else TILED for c in counts for _ in range(c)]
        layouts = [layout_of(cfg, size, kind) for size, kind in zip(sizes.tolist(), kinds, strict=True)]
        pixels = torch.randn(n, max(layout.n_tiles for layout in layouts), *shape, generator=generator)
        given = {"pixel_values": pixels, "image_sizes": sizes}
        if cfg.tiles_single_images_only:
            given["batch_num_images"] = torch.tensor(counts)
        return given, [layout.n_tokens for layout in layouts]
    pixels = torch.randn(n, *shape, generator=generator)
    return {"pixel_values": pixels[None] if cfg.image_layout == "tiles" else pixels}, [vision.n_features] * n


def alone(row: MultimodalInputs) -> MultimodalInputs:
    """One row of a batch without its pads."""
    keep = row.attention_mask[0]
    tokens, mask = row.tokens[:, keep], row.attention_mask[:, keep]
    lengths = [row.count_image_tokens(0, span) for span in row.spans[0].images]
    spans = find_spans(tokens, mask, row.image_token_ids, [lengths])
    return replace(row, tokens=tokens, attention_mask=mask, position_ids=row.position_ids[..., keep], spans=spans)


def as_hf(inputs: MultimodalInputs, dtype: torch.dtype, types: bool = False) -> dict[str, Tensor]:
    """The tensors that Hugging Face's model takes for the same inputs; `types`: it reads which tokens are images'."""
    given = dict(input_ids=inputs.tokens, attention_mask=inputs.attention_mask.long(), position_ids=inputs.position_ids)
    if inputs.pixel_values is None:
        return given
    pixels = inputs.pixel_values.to(dtype)
    if inputs.crop_grids is not None:
        grids = inputs.crop_grids
        given["pixel_values"] = torch.cat([x[: h * w] for x, (h, w) in zip(pixels, grids.tolist(), strict=True)])
        given["image_grid_thw"] = torch.cat([torch.ones_like(grids[:, :1]), grids], 1)
        given["mm_token_type_ids"] = inputs.image_mask.long()
    elif "image_sizes" in inputs.extras:
        assert inputs.crop_rows is not None and inputs.crop_images is not None
        owners = torch.stack([inputs.crop_rows, inputs.crop_images], 1)
        _, counts = owners.unique_consecutive(dim=0, return_counts=True)
        given["pixel_values"] = pad_sequence(list(pixels.split(counts.tolist())), batch_first=True)
        given["image_sizes"] = inputs.extras["image_sizes"]
        if bool((inputs.extras["image_kinds"] != TILED).any()):
            given["batch_num_images"] = torch.tensor([n for n in inputs.n_images if n])
    elif "tile_grids" in inputs.extras:
        given |= tiles_as_hf(inputs, pixels)
    else:
        given["pixel_values"] = pixels
        if types:
            given["token_type_ids"] = inputs.image_mask.long()
    return given


def relative_difference(ours: Float[Tensor, "*any"], theirs: Float[Tensor, "*any"]) -> float:
    """max |a - b| / max |b|."""
    a, b = ours.double(), theirs.double().to(ours.device)
    return float((a - b).abs().max() / b.abs().max())


def _largest(errors: Sequence[float]) -> float:
    """Their maximum; a NaN stays one (the built-in `max` may lose it)."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _logits(
    model: Any, theirs: Any, batch: MultimodalInputs, rows: Sequence[MultimodalInputs], dtype: torch.dtype
) -> Iterator[Check]:
    """Single rows and the padded batch against Hugging Face, and against each other."""
    exact, loose, types = TOLERANCE[dtype], TOLERANCE_OTHER_SHAPES[dtype], model.cfg.bidirectional_images
    what = "logits with pictures" if batch.pixel_values is not None else "logits"
    single = [model(row) for row in rows]
    errors = [
        relative_difference(a, theirs(**as_hf(row, dtype, types)).logits) for a, row in zip(single, rows, strict=True)
    ]
    yield Check(name=f"{what}, against Hugging Face", error=_largest(errors), allowed=exact)
    padded, keep = model(batch), batch.attention_mask
    reference = theirs(**as_hf(batch, dtype, types)).logits
    error = relative_difference(padded[keep], reference[keep.to(reference.device)])
    yield Check(name="left-padded batch, against Hugging Face", error=error, allowed=exact)
    errors = [relative_difference(padded[i, keep[i]], single[i][0]) for i in range(len(rows))]
    yield Check(name="row of a padded batch, against the row alone", error=_largest(errors), allowed=loose)


def _decoding(model: Any, theirs: Any, batch: MultimodalInputs, dtype: torch.dtype) -> Iterator[Check]:
    """Greedy tokens, ours with a cache and Hugging Face's, judged by our logits without a cache: how far below
    the best token each chosen one lies. 0 unless two tokens are as good as equal."""
    n_new = min(N_NEW, model.cfg.n_ctx - batch.shape[1])
    if n_new < 1:
        return
    plain = dict(eos_token_id=[], repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=0)
    cached = model.generate(batch, max_new_tokens=n_new, return_type="tokens", **plain)
    given = as_hf(batch, dtype, model.cfg.bidirectional_images)
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


def _shortfall(model: Any, batch: MultimodalInputs, new: Int[Tensor, "batch new"]) -> float:
    """The largest distance of a chosen token's logit below the best one, relative to the largest logit."""
    logits = model(batch.with_new_tokens(new))[:, batch.shape[1] - 1 : -1].double()
    chosen = logits.gather(-1, new.to(logits.device)[..., None])[..., 0]
    return float((logits.amax(-1) - chosen).max() / logits.abs().max())


# --- hook points ------------------------------------------------------------------------------------------
@torch.no_grad()
def dead_hooks(model: Any, inputs: MultimodalInputs, tolerance: float, progress: bool = True) -> tuple[str, ...]:
    """Names of hook points where noise as large as the value leaves every logit as it was.

    Edits of block l start from the residual that enters it, which spares the tower and earlier blocks."""
    names = [n for n in hooks_of(model.cfg) if inputs.pixel_values is not None or not _belongs_to_pictures(n)]
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


def _belongs_to_pictures(name: str) -> bool:
    return name.startswith(("vision.", "connector.", "deepstack.")) or name == "hook_image_features"


def _with_noise(name: str, value: Float[Tensor, "*any"], hook: Any) -> Float[Tensor, "*any"]:
    """The value with noise of its own size; a denominator stays positive, masked scores stay masked."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(value.shape, generator=generator).to(value)
    if name.endswith("hook_scale"):
        return value * (1 + noise)
    finite = value > torch.finfo(value.dtype).min / 2
    size = value[finite].float().pow(2).mean().sqrt().to(value)
    size = torch.where(size > 0, size, torch.ones_like(size))  # what happens to be 0 must be heard as well
    return torch.where(finite, value + (2 * noise - 1) * size, value)


def _shown(names: Sequence[str], progress: bool) -> Any:
    if not progress:
        return names
    from tqdm.auto import tqdm

    return tqdm(names, desc="hook points", leave=False, disable=None)  # None: only where somebody looks
