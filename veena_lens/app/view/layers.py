"""What a view knows of each layer and position apart from heads: norms, and the logit lens in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.activation_cache import ActivationCache
from veena_lens.app.view.coding import encode
from veena_lens.circuits import logit_lens
from veena_lens.inputs import MultimodalInputs

RANKS = 4  # tokens that are named at a position
MOST_WORDS = 8


def resid_names(n_layers: int, part: str = "hook_resid_post") -> list[str]:
    """The residual's hook in every layer."""
    return [f"blocks.{layer}.{part}" for layer in range(n_layers)]


def norms_of(cache: ActivationCache, row: int, n_layers: int, part: str) -> Float[Tensor, "layer pos"] | None:
    """The residual's length in every layer; None where the cache lacks a layer."""
    names = resid_names(n_layers, part)
    if any(name not in cache.cache_dict for name in names):
        return None
    values = (cache.cache_dict[name] for name in names)
    return torch.stack([(v[row] if cache.has_batch_dim else v).float().norm(dim=-1).cpu() for v in values])


def lens_of(
    model: Any, cache: ActivationCache, inputs: MultimodalInputs, row: int, words: Sequence[str | int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The lens at every position: the likeliest tokens of every layer, and `words`' probabilities as maps.

    Gives the header's entry and its arrays."""
    n, length = model.cfg.n_layers, inputs.shape[1]
    best = logit_lens(model, cache, "all", k=RANKS, values="prob")
    at = torch.tensor(best.meta["positions"][row])
    texts = {int(token): text for token, text in best.meta.get("texts", {}).items()}
    table = sorted({token for layer in best.meta["tokens"][row] for cell in layer for token in cell})
    number = {token: i for i, token in enumerate(table)}
    ranks = min(RANKS, best.shape[-1])
    ids = np.zeros((n, length, ranks), dtype=np.int32)
    probs = np.zeros((n, length, ranks), dtype=np.uint8)
    told = best.meta["tokens"][row]
    ids[:, at] = [[[number[token] for token in cell] for cell in layer] for layer in told]
    probs[:, at] = (best.values[row, :, : len(at)].cpu() * 255).round().to(torch.uint8).numpy()
    header: dict[str, Any] = {"texts": [texts.get(token, f"#{token}") for token in table], "words": []}
    arrays = {"lens_ids": ids, "lens_probs": probs}
    if words:
        chosen = logit_lens(model, cache, "all", list(words), values="prob")
        maps = torch.zeros(len(words), n, length)
        maps[..., at] = chosen.values[row, :, : len(at)].permute(2, 0, 1).float().cpu()
        coded = encode(maps, inputs.image_mask[row])
        arrays |= {"lens_maps": coded.values.numpy(), "lens_scales": coded.scales.numpy()}
        header["words"] = [_text(model, word) for word in words]
    return header, arrays


def _text(model: Any, word: str | int) -> str:
    if isinstance(word, str):
        return word
    return f"#{word}" if model.tokenizer is None else model.tokenizer.decode([word])


def words_of(model: Any, inputs: MultimodalInputs, row: int, logits: Float[Tensor, "pos d_vocab"]) -> list[int]:
    """Tokens worth a map: the answer's, without those that end it, or the likeliest next ones without an answer."""
    answer = inputs.spans[row].answer
    if answer is None or answer.start == answer.stop:
        return logits[inputs.spans[row].last].topk(min(5, logits.shape[-1])).indices.tolist()
    ids = inputs.tokens[row, answer].tolist()
    return [i for i in dict.fromkeys(ids) if i not in inputs.end_token_ids][:MOST_WORDS]
