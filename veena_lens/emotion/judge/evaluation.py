"""One table for all methods: the same held-out images under the same conditions, with paired differences.

The task is emotional hallucination: a context sentence says another emotion (weakly, plainly, strongly), beside
images without context and with a consistent one, so that rescue and harm are seen together. Answers are written as
they come; intervals draw identities, and differences to the plain model are paired by image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.circuits import sign_flip_test
from veena_lens.circuits.statistics import drawn_weights, mean_interval
from veena_lens.emotion.methods import PLAIN, Method, answers_to, batches, prepared, require_sizes
from veena_lens.emotion.study import Study, stage
from veena_lens.long_runs import counting
from veena_lens.scores import Scores

NEUTRAL = "neutral"


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """The answers of every method to every example, `texts[condition][method]`, and their scores.

    `hits`, `followed` (condition, method, example): 1 where the answer names the image's emotion, or the context's;
    rows of examples that a condition lacks are masked. `table()` sums up; `per_emotion()` gives recalls.
    """

    texts: Mapping[str, Mapping[str, Sequence[str]]]
    examples: Mapping[str, Sequence[Any]]
    hits: Mapping[str, Mapping[str, Tensor]]
    followed: Mapping[str, Mapping[str, Tensor]]
    false_emotions: Mapping[str, Mapping[str, Tensor]]
    methods: Sequence[str]
    baseline: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draws: int = 2000
    seed: int = 0

    def table(self) -> Any:
        """Return a table with one row per condition and method: n, hit rate with its interval, the difference to the
        baseline with its interval and p (sign flips of identities), the share that follows the context, and of neutral
        images the share that is given an emotion ("false"), with the balanced score (mean of emotional hits and 1 -
        false)."""
        import pandas as pd

        rows = []
        for condition, by_method in self.hits.items():
            examples = self.examples[condition]
            identities = [e.identity for e in examples]
            emotional = torch.tensor([e.emotion != NEUTRAL for e in examples])
            weights = drawn_weights(identities, self.draws, self.seed)
            plain = by_method[self.baseline]
            for method in self.methods:
                mine = by_method[method]
                low, mean, high = mean_interval(mine, weights).tolist()
                row = {"condition": condition, "method": method, "n": len(mine), "hit": mean, "low": low, "high": high}
                if method != self.baseline:
                    change = mean_interval(mine - plain, weights).tolist()
                    row |= {"difference": change[1], "difference_low": change[0], "difference_high": change[2]}
                    row |= {"p": _p(mine - plain, identities, self.seed)}
                row |= {"follows_context": _mean(self.followed[condition][method])}
                false = self.false_emotions[condition][method]
                recall = mine[emotional].mean().item() if bool(emotional.any()) else float("nan")
                row |= {"false": _mean(false), "balanced": (recall + 1 - _mean(false)) / 2}
                rows.append(row)
        return pd.DataFrame(rows)

    def per_emotion(self) -> Any:
        """Return the hit rate by condition, method and the image's emotion."""
        import pandas as pd

        rows = []
        for condition, by_method in self.hits.items():
            names = [e.emotion for e in self.examples[condition]]
            for method, mine in by_method.items():
                for emotion in dict.fromkeys(names):
                    chosen = torch.tensor([name == emotion for name in names])
                    rows.append(
                        {"condition": condition, "method": method, "emotion": emotion}
                        | {"n": int(chosen.sum()), "hit": mine[chosen].mean().item()}
                    )
        return pd.DataFrame(rows)

    def scores(self) -> Scores:
        """Return hit rates with intervals as Scores (condition, method, bound)."""
        table = self.table()
        conditions = list(self.hits)
        values = torch.tensor(
            [
                [
                    table[(table["condition"] == c) & (table["method"] == m)][["low", "hit", "high"]].iloc[0].tolist()
                    for m in self.methods
                ]
                for c in conditions
            ],
            dtype=torch.float64,
        )
        labels = {"condition": conditions, "method": list(self.methods), "bound": ["low", "mean", "high"]}
        return Scores(values, ("condition", "method", "bound"), labels, "hit rate", "share")

    def __repr__(self) -> str:
        lines = [f"Evaluation({len(self.methods)} methods, {len(self.hits)} conditions; hit rate)"]
        width = max(len(m) for m in self.methods)
        lines.append(" " * (width + 2) + "  ".join(self.hits))
        for method in self.methods[:20]:
            values = "  ".join(f"{by[method].mean().item():.3f}".rjust(len(c)) for c, by in self.hits.items())
            lines.append(f"  {method.ljust(width)}{values}")
        return "\n".join(lines)


@stage(wheels=None, batch_size=16, max_new_tokens=24, draws=2000, seed=0, out=None, progress=True)
def evaluate(study: Study, conditions: Mapping[str, Sequence[Any]], methods: Sequence[Method]) -> Evaluation:
    """Ask every method about every condition's examples, and judge the answers.

    Args:
        study: the model, or a `Study` that holds the settings `wheels` to `progress` below.
        conditions: examples by the name of their condition.
        methods: what is compared; the plain model is the baseline, and is added in front where it is missing.
        wheels: emotion wheels that judge answers; by default the project's own.
        batch_size, max_new_tokens: of the answers.
        draws, seed: of the intervals.
        out: a folder where answers are kept batch by batch, and from which the same evaluation resumes.
        progress: True shows a progress bar.

    Raises: ValueError for no examples, two methods of one name, or a batch size or length below 1.
    """
    model, asking = study.model, study.asking
    require_sizes(asking.batch_size, asking.max_new_tokens)
    methods = list(methods) if any(m.name == PLAIN.name for m in methods) else [PLAIN, *methods]
    names = [m.name for m in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"evaluate: two methods are named {twice[0]!r}; names must be unique.")
    if not conditions or not all(len(examples) for examples in conditions.values()):
        raise ValueError("evaluate: every condition needs at least one example.")
    total = sum(len(x) for x in conditions.values()) * len(methods)
    texts: dict[str, dict[str, list[str]]] = {}
    store = study.store("answers", tokens=asking.max_new_tokens)
    # Named by what a method does: the same heads and strength are not asked again under another name.
    does = [store.key(method) for method in methods]
    with counting(total, "answers", study.progress) as advance:
        for condition, examples in conditions.items():
            texts[condition] = {m.name: [] for m in methods}
            for some in batches(examples, asking.batch_size):
                asked = store.key(some)
                shared: list[Any] = []  # prepared once for all methods that leave the prompt as it is
                for method, what in zip(methods, does, strict=True):

                    def run(some: list[Any] = some, method: Method = method, shared: list[Any] = shared) -> Any:
                        if method.prompt is not None:
                            inputs = prepared(model, some, method)
                        else:
                            inputs = shared[0] if shared else prepared(model, some)
                            shared[:] = [inputs]
                        return {"texts": answers_to(model, inputs, method, asking.max_new_tokens)}

                    texts[condition][method.name] += store.do([what, asked], run)["texts"]
                    advance(len(some))
    settings = {m.name: dict(m.settings) for m in methods}
    return score_answers(conditions, texts, study.wheels, PLAIN.name, settings, study.draws, study.seed)


def score_answers(
    conditions: Mapping[str, Sequence[Any]],
    texts: Mapping[str, Mapping[str, Sequence[str]]],
    wheels: Any,
    baseline: str,
    settings: Mapping[str, Mapping[str, Any]],
    draws: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate texts that are there already.

    Args:
        conditions: examples by the name of their condition.
        texts: the answers, by condition and method, in the order of the examples.
        wheels: emotion wheels that judge answers.
        baseline: the name of the method that the others are compared with.
        settings: each method's settings, by name.
        draws, seed: of the intervals.
    """
    from veena_lens.emotion.words.wheels import sample_hit

    hits: dict[str, dict[str, Tensor]] = {}
    followed: dict[str, dict[str, Tensor]] = {}
    false: dict[str, dict[str, Tensor]] = {}
    nan = float("nan")
    for condition, examples in conditions.items():
        hits[condition], followed[condition], false[condition] = {}, {}, {}
        for method, said in texts[condition].items():
            hit, told, wrong = [], [], []
            for example, text in zip(examples, said, strict=True):
                named = wheels.emotions(text)
                hit.append(float(sample_hit(text, example.emotion, wheels) > 0.5))
                other = example.context_emotion not in (None, example.emotion)
                told.append(float(sample_hit(text, example.context_emotion, wheels) > 0.5) if other else nan)
                is_neutral = example.emotion == NEUTRAL
                wrong.append(float(any(name != NEUTRAL for name in named)) if is_neutral else nan)
            for table, column in ((hits, hit), (followed, told), (false, wrong)):
                table[condition][method] = torch.tensor(column, dtype=torch.float64)
    return Evaluation(
        texts=texts,
        examples=conditions,
        hits=hits,
        followed=followed,
        false_emotions=false,
        methods=list(next(iter(texts.values()))),
        baseline=baseline,
        settings=settings,
        draws=draws,
        seed=seed,
    )


def _p(differences: Float[Tensor, " n"], identities: Sequence[str], seed: int) -> float:
    """Return p of the mean difference when whole identities' signs are flipped; 1 where no answer changed."""
    if len(set(identities)) < 2:
        return float("nan")
    if not bool(differences.any()):
        return 1.0
    scores = Scores(differences, ("pair",))
    return float(sign_flip_test(scores, groups=identities, seed=seed).values)


def _mean(x: Tensor) -> float:
    return float(x.nanmean()) if bool((~x.isnan()).any()) else float("nan")
