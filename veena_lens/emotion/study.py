"""A study: a model, how it is asked, how results are judged and where they are kept, as one value for every stage.

Stages take a `Study` as their first argument. Called alone, they also take a model there, with the settings of the
study that they read as keywords: `key_layers(model, pairs, directions, draws=500)` builds the study in between.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.methods import PLAIN, Method, generate_answers, next_logits
from veena_lens.emotion.words.wheels import EmotionWheels, sample_hit
from veena_lens.long_runs import Result, Store

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R", covariant=True)

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

    class Stage(Protocol[P, R]):
        """A function of a study that also takes a model, with settings of the study as further keywords."""

        @overload
        def __call__(self, model: Study, *args: P.args, **kwargs: P.kwargs) -> R: ...
        @overload
        def __call__(self, model: Any, *args: Any, **settings: Any) -> R: ...


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How the model is asked.

    Attributes:
        question: put in the place of the examples' own; None leaves those.
        lead_in: the begun answer after which states are read; None reads at the last token of the prompt.
        batch_size: prompts in a batch.
        max_new_tokens: the longest answer, in tokens.
    """

    question: str | None = None
    lead_in: str | None = None
    batch_size: int = 16
    max_new_tokens: int = 24

    @property
    def sizes(self) -> dict[str, Any]:
        """Return batch size and length by name, as functions take them that generate answers."""
        return {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """What every stage of the method shares.

    Attributes:
        model: the model that is studied.
        wheels: the emotion wheels that answers are judged by; by default the project's own.
        asking: how the model is asked.
        draws: draws of identities for bootstrap intervals.
        seed: of every draw.
        out: the folder where results are kept as they come and from which a stopped stage goes on; None keeps nothing.
        progress: True shows progress bars.
    """

    model: HookedVLM
    wheels: EmotionWheels = field(default_factory=EmotionWheels.default)
    asking: Asking = Asking()
    draws: int = 2000
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    @staticmethod
    def of(model: Any, **settings: Any) -> Study:
        """Return the study of a model with these settings, those of `Asking` among them.

        Args:
            model: the model.
            settings: any of `wheels` (None: the default), `draws`, `seed`, `out`, `progress`, `question`, `lead_in`,
                `batch_size`, `max_new_tokens`.
        """
        asking = {name: settings.pop(name) for name in list(settings) if name in Asking.__dataclass_fields__}
        if "store" in settings:  # what `extract_directions` calls the folder
            settings["out"] = settings.pop("store")
        if settings.get("wheels") is None:
            settings.pop("wheels", None)
        if settings.get("out") is not None:
            settings["out"] = Path(settings["out"])
        return Study(model=model, asking=Asking(**asking), **settings)

    def but(self, **changes: Any) -> Study:
        """Return the same study with other settings, those of `Asking` among them."""
        asking = {name: changes.pop(name) for name in list(changes) if name in Asking.__dataclass_fields__}
        return replace(self, asking=replace(self.asking, **asking), **changes)

    def answers(self, examples: Sequence[Any], method: Method = PLAIN) -> list[str]:
        """Return what the model says of each example under a method (`generate_answers`)."""
        return generate_answers(self.model, examples, method, **self.asking.sizes)

    def last_logits(self, examples: Sequence[Any], method: Method = PLAIN) -> Float[Tensor, "example d_vocab"]:
        """Return the logits of the token after the prompt, or after the lead-in, under a method (`next_logits`)."""
        return next_logits(self.model, examples, method, self.asking.lead_in, batch_size=self.asking.batch_size)

    def hits(self, texts: Sequence[str], examples: Sequence[Any]) -> Float[Tensor, " example"]:
        """Return how far each text names its example's emotion: the share of wheels that agree, in [0, 1]."""
        rates = [sample_hit(text, example.emotion, self.wheels) for text, example in zip(texts, examples, strict=True)]
        return torch.tensor(rates, dtype=torch.float64)

    def store(self, what: str, **about: Any) -> Store:
        """Return the store of one stage, whose results depend on the model and on `about`."""
        return Store(self.out, {"what": what, "model": self.model, **about})

    def each(
        self,
        what: str,
        items: Sequence[T],
        compute: Callable[[T], Result],
        *,
        name: Callable[[T], Any] = lambda item: item,
        **about: Any,
    ) -> list[Result]:
        """Return what `compute` gives for every item, under a progress bar, kept in the stage's store.

        Args:
            what: the stage and what its items are, such as "key heads: pairs".
            items: what to compute.
            compute: gives an item's result, a dictionary of tensors and of anything JSON holds.
            name: what tells an item from the others; by default the item.
            about: what the results depend on, apart from the model (`fingerprints.fingerprint`).
        """
        return self.store(what, **about).each(items, compute, name=name, label=what, show=self.progress)


def stage(**defaults: Any) -> Callable[[Callable[Concatenate[Study, P], R]], Stage[P, R]]:
    """Let a function of a `Study` also take a model in its place, with the settings that it reads as keywords.

    Args:
        defaults: those settings of the study, each with its default; `help()` shows them among the keywords. A
            `Settings` among the arguments of a call stands for the settings that it holds as well.
    """

    def decorate(function: Callable[Concatenate[Study, P], R]) -> Stage[P, R]:
        @functools.wraps(function)
        def call(model: Any, *args: Any, **given: Any) -> Any:
            if isinstance(model, Study):
                return function(model, *args, **given)
            settings = {name: given.pop(name, default) for name, default in defaults.items()}
            run = next((x for x in (*args, *given.values()) if hasattr(x, "for_study")), None)
            return function(Study.of(model, **(run.for_study() if run is not None else {}), **settings), *args, **given)

        first, *others = inspect.signature(function).parameters.values()
        model = first.replace(name="model", annotation="HookedVLM | Study")
        keywords = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in defaults.items()]
        signature = inspect.signature(function).replace(parameters=[model, *others, *keywords])
        call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return call  # pyright: ignore[reportReturnType]

    return decorate
