"""How much less fluent answers became: perplexity under the untouched model of all words but emotion words.

A text that names another emotion than before need not be less fluent; a broken text is. The same text of the same
example is measured once, however many methods say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.judge.side_effects import perplexity
from veena_lens.emotion.locate.answer_slot import emotion_tokens
from veena_lens.emotion.methods import batches
from veena_lens.long_runs import Store, digest

FLUENCY = 1.2  # perplexity may rise by a fifth


class Fluency:
    """Changes of log perplexity against plain answers, each text measured once. out: kept there, and resumed."""

    def __init__(
        self, model: Any, emotions: Sequence[str], wheels: Any, *, batch_size: int = 16, out: str | Path | None = None
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.skip = emotion_tokens(model, sorted(set(emotions)), wheels)
        self.store = Store(out, {"what": "perplexity", "skip": sorted(self.skip), "model": model})
        self.known: dict[tuple[str, str, bool], float] = {}

    def changes(self, examples: Sequence[Any], texts: Sequence[str], plain: Sequence[str]) -> Float[Tensor, " example"]:
        """log perplexity of each text less that of the plain answer to the same example, in nats.

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
