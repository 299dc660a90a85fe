"""A method: all that is done to a model while it answers, as one value, so that all are compared on the same footing.

It may intervene (one list for every row, or lists that follow from the batch), reword the prompt, and change how
tokens are chosen. `generate_answers` and `next_logits` run any method over examples in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens import long_runs
from veena_lens.fingerprints import fingerprint
from veena_lens.inputs import MultimodalInputs

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

PerRow = Callable[[Any, MultimodalInputs], Sequence[Sequence[Any]]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Method:
    """A method: all that is done while a model answers.

    `interventions`: a list (or Circuit) for every row, or a function (model, inputs) -> one list per row, called before
    the block in which the batch runs. `prompt`: rewords the prompt. `decoding`: (model, inputs) -> logits processors
    as transformers has them, made anew for each batch. `about`: one line; `settings`: JSON-able, what was chosen.
    """

    name: str
    interventions: Sequence[Any] | PerRow = ()
    prompt: Callable[[str], str] | None = None
    decoding: Callable[[Any, MultimodalInputs], Sequence[Any]] | None = None
    about: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: HookedVLM, inputs: MultimodalInputs) -> Iterator[None]:
        """Put the method's interventions in force for this batch."""
        if callable(self.interventions):
            per_row = [list(mine) for mine in self.interventions(model, inputs)]
            with model.intervene(per_row=per_row):
                yield
        else:
            with model.intervene(list(self.interventions)):
                yield

    def fingerprint(self) -> list[Any]:
        """Return what tells this method's answers from another's: what it does, and its settings where that is code.

        Where it is nothing but a list of interventions, their fields say it, whatever the method is called."""
        if self.prompt is None and self.decoding is None and not callable(self.interventions):
            return [fingerprint(item) for item in self.interventions]
        does = [fingerprint(part) for part in (self.interventions, self.prompt, self.decoding)]
        return [self.name, fingerprint(self.settings), *does]

    def __repr__(self) -> str:
        parts = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"Method({self.name!r}{': ' if parts else ''}{parts})"


# Where tools read: the last token of the prompt, or of the answer's lead-in where there is one; and the query with it.
ROWS: dict[str, Any] = {"last": -1, "query": "query+answer"}

PLAIN = Method(name="plain", about="the model as it is")


def prepared(model: HookedVLM, examples: Sequence[Any], method: Method = PLAIN, lead_in: str | None = None) -> Any:
    """Return the examples as one batch: each one's image and prompt, reworded by the method, with an answer begun."""
    texts = [example.prompt if method.prompt is None else method.prompt(example.prompt) for example in examples]
    pictures = [[example.picture] for example in examples]
    if lead_in is None:
        return model.prepare(text=texts, images=pictures)
    return model.prepare(text=texts, images=pictures, answer=[lead_in] * len(texts))


def generate_answers(
    model: HookedVLM,
    examples: Sequence[Any],
    method: Method = PLAIN,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    progress: bool = False,
) -> list[str]:
    """Return what the model says of each example under the method: greedy, in the order of the examples.

    Args:
        model: the model.
        examples: what is asked; each needs `.picture` and `.prompt`.
        method: what is done meanwhile; by default the plain model.
        batch_size: examples in a batch.
        max_new_tokens: the longest answer, in tokens.
        progress: True shows a progress bar.

    Raises: ValueError for a batch size or length below 1, or as `generate`."""
    require_sizes(batch_size, max_new_tokens)
    texts: list[str] = []
    for batch in long_runs.progress(
        batches(examples, batch_size), method.name, progress, total=len(examples), size=len
    ):
        texts += answers_to(model, prepared(model, batch, method), method, max_new_tokens)
    return texts


def answers_to(model: HookedVLM, inputs: MultimodalInputs, method: Method, max_new_tokens: int) -> list[str]:
    """Return what the model says of one prepared batch under the method."""
    rules = () if method.decoding is None else list(method.decoding(model, inputs))
    with method.applied(model, inputs):
        return model.generate(inputs, max_new_tokens=max_new_tokens, logits_processor=rules or None)


@torch.no_grad()
def next_logits(
    model: HookedVLM,
    examples: Sequence[Any],
    method: Method = PLAIN,
    lead_in: str | None = None,
    *,
    batch_size: int = 16,
) -> Float[Tensor, "example d_vocab"]:
    """Return the logits of the token after the prompt (or after `lead_in`), under the method's prompt and
    interventions.

    Rules of decoding act on whole generations and take no part here.

    Args:
        model: the model.
        examples: images with prompts.
        method: what is done meanwhile; by default the plain model.
        lead_in: begun answer after which the token follows; by default none.
        batch_size: examples in a batch.

    Raises: as `generate_answers`."""
    require_sizes(batch_size, 1)
    found = []
    for batch in batches(examples, batch_size):
        inputs = prepared(model, batch, method, lead_in)
        with method.applied(model, inputs):
            found.append(model.last_logits(inputs).float().cpu())
    return torch.cat(found)


def batches(examples: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Return the examples in runs of at most `size`, in order."""
    return (list(examples[start : start + size]) for start in range(0, len(examples), size))


def require_sizes(batch_size: int, max_new_tokens: int) -> None:
    """Require sizes of at least 1. Raises: ValueError for a batch size or a length below 1."""
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size={batch_size} and max_new_tokens={max_new_tokens} must be at least 1.")
