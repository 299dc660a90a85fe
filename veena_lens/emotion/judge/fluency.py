"""Fluency of answers: their perplexity under the model without interventions, emotion words left out.

A text that names another emotion than before need not be less fluent; a broken text is. The same text of the same
example is measured once, however many methods say it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.locate.answer_slot import emotion_tokens
from veena_lens.emotion.methods import batches
from veena_lens.fingerprints import digest
from veena_lens.long_runs import Store

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

FLUENCY = 1.2  # perplexity may rise by a fifth


@torch.no_grad()
def perplexity(
    model: HookedVLM,
    examples: Sequence[Any],
    texts: Sequence[str],
    *,
    skip: Collection[int] = (),
    batch_size: int = 16,
) -> Float[Tensor, " example"]:
    """Return how surprised the untouched model is by each text, given the example's image and own prompt.

    exp(mean over the text's tokens of -log p(token | image, prompt, tokens before)), at least 1; NaN for a text
    without tokens. The end of the text is not counted, nor are tokens of `skip` (which still stand before others): a
    text that names another emotion than the image's need not be less fluent. Interventions in force do not act.

    Args:
        model: the model.
        examples: images with prompts.
        texts: one per example.
        skip: ids of tokens that are not counted.
        batch_size: texts in a batch.

    Raises: ValueError for numbers of texts and examples that differ, or a batch size below 1.
    """
    require_pairs("perplexity", examples, texts)
    if batch_size < 1:
        raise ValueError(f"perplexity: batch_size={batch_size} must be at least 1.")
    found = []
    skipped = set(skip)
    pairs = list(zip(examples, texts, strict=True))
    with model.without_interventions():
        for batch in batches(pairs, batch_size):
            prompts = [example.prompt for example, _ in batch]
            pictures = [[example.picture] for example, _ in batch]
            inputs = model.prepare(text=prompts, images=pictures, answer=[text for _, text in batch])
            resid = model(inputs, stop_at_layer=model.cfg.n_layers)
            for row, spans in enumerate(inputs.spans):
                at = spans.answer
                assert at is not None
                if at.start == at.stop:
                    found.append(math.nan)
                    continue
                # Only the rows that predict a token of the text are unembedded: a vocabulary is wide.
                logits = model.unembed_resid(resid[row : row + 1, at.start - 1 : at.stop - 1])[0].float()
                tokens = inputs.tokens[row, at].to(logits.device)
                loss = F.cross_entropy(logits, tokens, reduction="none")
                counted = loss[[int(token) not in skipped for token in tokens]]
                found.append(float(counted.mean().exp()) if len(counted) else math.nan)
    return torch.tensor(found)


def require_pairs(who: str, examples: Sequence[Any], others: Sequence[Any]) -> None:
    """Require as many others as examples. Raises: ValueError where there is not one of the others per example."""
    if len(examples) != len(others):
        raise ValueError(f"{who}: {len(others)} texts for {len(examples)} examples; give one per example.")


class Fluency:
    """A measure of changes of log perplexity against plain answers, each text once. out: kept there, and resumed."""

    def __init__(
        self,
        model: HookedVLM,
        emotions: Sequence[str],
        wheels: Any,
        *,
        batch_size: int = 16,
        out: str | Path | None = None,
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.skip = emotion_tokens(model, sorted(set(emotions)), wheels)
        self.store = Store(out, {"what": "perplexity", "skip": sorted(self.skip), "model": model})
        self.known: dict[tuple[str, str, bool], float] = {}

    def changes(self, examples: Sequence[Any], texts: Sequence[str], plain: Sequence[str]) -> Float[Tensor, " example"]:
        """Return the log perplexity of each text less that of the plain answer to the same example, in nats.

        Emotion words are left out of both. A text of nothing else has nothing that could break: 0. Against a plain
        answer of nothing else the whole plain answer counts."""
        mine, before = self._logs(examples, texts, whole=False), self._logs(examples, plain, whole=False)
        bare = before.isnan().nonzero().flatten().tolist()
        if bare:
            before = before.clone()
            said = [str(plain[i]) for i in bare]
            before[bare] = self._logs([examples[i] for i in bare], said, whole=True)
        same = torch.tensor([a == b for a, b in zip(texts, plain, strict=True)], dtype=torch.bool)
        return torch.where(same, 0.0, mine - before).nan_to_num(0.0)

    def _logs(self, examples: Sequence[Any], texts: Sequence[str], whole: bool) -> Float[Tensor, " example"]:
        keys = [(digest(e), text, whole) for e, text in zip(examples, texts, strict=True)]
        missing = {key: (e, key[1]) for key, e in zip(keys, examples, strict=True) if key not in self.known}
        skip = () if whole else self.skip
        for some in batches(list(missing), self.batch_size):

            def run(some: list[Any] = some) -> dict[str, Any]:
                them, said = [missing[key][0] for key in some], [key[1] for key in some]
                return {"log": perplexity(self.model, them, said, skip=skip, batch_size=self.batch_size).double().log()}

            found = self.store.do(some, run)["log"]
            self.known |= dict(zip(some, found.tolist(), strict=True))
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)
