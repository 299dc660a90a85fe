"""What an intervention costs beside what it was meant for: fluency, repetition, length, drift, other answers, time.

Numbers about a text stay one per example, so that they can be paired and resampled; `measure_side_effects` sums them
up.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.judge.fluency import perplexity, require_pairs
from veena_lens.emotion.methods import PLAIN, Method, batches, generate_answers, next_logits, prepared
from veena_lens.emotion.study import Study, stage

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

_WORDS = re.compile(r"\w+(?:['\u2019-]\w+)*")


def distinct_n(texts: Sequence[str], n: int = 2) -> Float[Tensor, " example"]:
    """Return different word n-grams over all word n-grams of each text, in (0, 1]; NaN for a text of fewer words.

    Source: Li et al. 2016, arXiv 1510.03055, distinct-1 and distinct-2."""
    if n < 1:
        raise ValueError(f"distinct: n={n} must be at least 1.")
    found = []
    for text in texts:
        said = words(text)
        grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
        found.append(len(set(grams)) / len(grams) if grams else math.nan)
    return torch.tensor(found)


def repetition(texts: Sequence[str], window: int = 16) -> Float[Tensor, " example"]:
    """Return the share of words that one of the `window` words before them was already, in [0, 1]; NaN for no words."""
    if window < 1:
        raise ValueError(f"repetition: window={window} must be at least 1.")
    found = []
    for text in texts:
        said = words(text)
        again = sum(word in said[max(0, i - window) : i] for i, word in enumerate(said))
        found.append(again / len(said) if said else math.nan)
    return torch.tensor(found)


def answer_lengths(texts: Sequence[str]) -> Float[Tensor, " example"]:
    """Return the number of words of each text."""
    return torch.tensor([float(len(words(text))) for text in texts])


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORDS.findall(text.lower())


@torch.no_grad()
def kl_from_plain(
    model: HookedVLM, examples: Sequence[Any], method: Method, lead_in: str | None = None, *, batch_size: int = 16
) -> Float[Tensor, " example"]:
    """Return KL(method || plain) of the token after the prompt (or `lead_in`), in nats; 0 where nothing changes.

    Rules of decoding count. This way round it is finite where a rule rules tokens out. Give neutral examples: there
    the method should change little. Arguments: those of `next_logits`. Raises: as `next_logits`."""
    plain = next_logits(model, examples, PLAIN, lead_in, batch_size=batch_size).double().log_softmax(-1)
    found = []
    for batch in batches(examples, batch_size):
        inputs = prepared(model, batch, method, lead_in)
        rules = () if method.decoding is None else method.decoding(model, inputs)
        with method.applied(model, inputs):
            logits = model.last_logits(inputs).float()
            for rule in rules:
                logits = rule(inputs.tokens, logits)
        found.append(logits.double().cpu().log_softmax(-1))
    other = torch.cat(found)
    terms = torch.where(other.isneginf(), 0.0, other.exp() * (other - plain))
    return terms.sum(-1).clamp(min=0).float()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An image with its own question, which `generate_answers` takes for an example."""

    picture: Any
    prompt: str


def attribute_accuracy(
    model: HookedVLM,
    examples: Sequence[Any],
    questions: Sequence[str],
    truths: Sequence[str | Sequence[str]],
    method: Method = PLAIN,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 16,
) -> Float[Tensor, " example"]:
    """Return 1 where the answer to the example's question holds a true one as whole words, else 0.

    Args:
        model: the model.
        examples: images.
        questions: one per example.
        truths: one text per question, or several of which any will do.
        method: what is done while the model answers; by default nothing.
        batch_size, max_new_tokens: of the answers.

    Raises: ValueError for numbers that do not match, or a truth without words."""
    require_pairs("attribute_accuracy", examples, questions)
    require_pairs("attribute_accuracy", examples, truths)
    wanted = [[words(t) for t in ([truth] if isinstance(truth, str) else truth)] for truth in truths]
    for truth, options in zip(truths, wanted, strict=True):
        if not options or not all(options):
            raise ValueError(f"attribute_accuracy: the truth {truth!r} holds no words to look for.")
    asked = [Asked(picture=e.picture, prompt=q) for e, q in zip(examples, questions, strict=True)]
    said = generate_answers(model, asked, method, batch_size=batch_size, max_new_tokens=max_new_tokens)
    hits = [any(_holds(words(text), option) for option in options) for text, options in zip(said, wanted, strict=True)]
    return torch.tensor([float(hit) for hit in hits])


@dataclass(frozen=True, eq=False, kw_only=True)
class Questions:
    """Other questions about images, with true answers: an example, a question and a truth each."""

    examples: Sequence[Any]
    asked: Sequence[str]
    truths: Sequence[str]

    def __len__(self) -> int:
        return len(self.asked)

    def share_right(self, model: HookedVLM, method: Method = PLAIN, *, batch_size: int = 16) -> float:
        """Return the share answered right under a method. Raises: as `attribute_accuracy`."""
        right = attribute_accuracy(model, self.examples, self.asked, self.truths, method, batch_size=batch_size)
        return float(right.mean())

    def __repr__(self) -> str:
        return f"Questions({len(self)} about {len({id(e) for e in self.examples})} pictures)"


def other_questions(examples: Sequence[Any], questions: Mapping[str, str] | None) -> Questions:
    """Return the questions for each attribute (attribute -> question) about every example that has it, example by
    example."""
    rows = [(e, q, str(e.attributes[a])) for e in examples for a, q in (questions or {}).items() if a in e.attributes]
    found, asked, truths = ([row[i] for row in rows] for i in range(3))
    return Questions(examples=found, asked=asked, truths=truths)


def described_accuracy(
    texts: Sequence[str], truths: Sequence[Mapping[str, str]], templates: Mapping[str, Sequence[str]]
) -> Float[Tensor, " example"]:
    """Return the share named right of the attributes that a description names; NaN where it names none.

    truths: attribute -> value, one per example. templates: attribute -> ways to name it with "{}" for the value, such
    as {"hair": ["{} hair", "hair is {}"]}. The values of all examples are looked for, as whole words; naming a wrong
    value beside the true one counts as wrong.
    Raises: ValueError for numbers that do not match, or a template without "{}"."""
    require_pairs("described_accuracy", truths, texts)
    for name, ways in templates.items():
        if not ways or any("{}" not in way for way in ways):
            raise ValueError(f'described_accuracy: the templates {list(ways)} of {name!r} need a "{{}}" each.')
    values = {name: sorted({truth[name] for truth in truths if name in truth}) for name in templates}
    found = []
    for text, truth in zip(texts, truths, strict=True):
        said, right = words(text), []
        for name, ways in templates.items():
            named = {v for v in values[name] for way in ways if _holds(said, words(way.replace("{}", v)))}
            if named and name in truth:
                right.append(named == {truth[name]})
        found.append(sum(right) / len(right) if right else math.nan)
    return torch.tensor(found)


def _holds(said: list[str], wanted: list[str]) -> bool:
    n = len(wanted)
    return any(said[i : i + n] == wanted for i in range(len(said) - n + 1))


def latency_ratio(
    model: HookedVLM,
    examples: Sequence[Any],
    method: Method,
    *,
    repeats: int = 5,
    batch_size: int = 16,
    max_new_tokens: int = 16,
) -> float:
    """Return the time of a token under the method over the plain model's: the median ratio of interleaved pairs of
    runs.

    Args:
        model: the model.
        examples: images with prompts.
        method: what is timed.
        repeats: pairs of runs.
        batch_size: examples in a batch.
        max_new_tokens: the longest answer, in tokens.

    Both run once before, to warm up. Texts that end early make fewer steps, so times count a step of the longest
    text of each batch. Raises: ValueError for no examples or no repeats."""
    if repeats < 1 or not examples:
        raise ValueError(f"latency_ratio: give at least one example and repeats={repeats} of at least 1.")
    ratios = []
    for i in range(repeats + 1):
        both = [PLAIN, method]
        took = [0.0, 0.0]
        for at in (0, 1) if i % 2 else (1, 0):  # whoever runs second finds warmer caches
            took[at] = _seconds(model, examples, both[at], batch_size, max_new_tokens)
        if i:
            ratios.append(took[1] / took[0])
    return median(ratios)


def _seconds(model: HookedVLM, examples: Sequence[Any], method: Method, batch_size: int, max_new_tokens: int) -> float:
    """Return the seconds per step of generation, all of a method's preparations included."""
    steps = 0

    def count(ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return scores

    rule = method.decoding
    counted = Method(
        name=method.name,
        interventions=method.interventions,
        prompt=method.prompt,
        decoding=lambda model, inputs: [*(rule(model, inputs) if rule else ()), count],
    )
    _wait(model)
    start = time.perf_counter()
    generate_answers(model, examples, counted, batch_size=batch_size, max_new_tokens=max_new_tokens)
    _wait(model)
    return (time.perf_counter() - start) / steps


def _wait(model: HookedVLM) -> None:
    if model.cfg.device is not None and model.cfg.device.type == "cuda":
        torch.cuda.synchronize(model.cfg.device)


@dataclass(frozen=True, kw_only=True)
class SideEffects:
    """A method's side effects, means over examples; None where nothing was given to measure it on.

    perplexity: of its texts under the untouched model (geometric mean); distinct_1, distinct_2, repetition: shares;
    length: words; drift: nats, on neutral examples; attributes: share of questions answered right; described: share of
    the attributes named in the texts that are right; latency: ratio to the plain model."""

    method: str
    n: int
    perplexity: float
    distinct_1: float
    distinct_2: float
    repetition: float
    length: float
    drift: float | None = None
    attributes: float | None = None
    described: float | None = None
    latency: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return every number by name, JSON-able."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __repr__(self) -> str:
        numbers = {k: v for k, v in self.to_dict().items() if k not in ("method", "n") and v is not None}
        parts = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        return f"SideEffects({self.method!r} on {self.n} examples: {parts})"


@stage(lead_in=None, batch_size=16, max_new_tokens=32)
def measure_side_effects(
    study: Study,
    examples: Sequence[Any],
    method: Method = PLAIN,
    texts: Sequence[str] | None = None,
    *,
    neutral: Sequence[Any] = (),
    questions: Sequence[str] = (),
    truths: Sequence[str | Sequence[str]] = (),
    templates: Mapping[str, Sequence[str]] | None = None,
    repeats: int = 0,
) -> SideEffects:
    """Measure all side effects of a method.

    Args:
        study: the model, or a `Study` that holds the settings `lead_in` to `max_new_tokens` below.
        examples: images with prompts.
        method: what is measured; by default the plain model.
        texts: what the method said of the examples; by default it is asked.
        neutral: examples for the drift, after `lead_in` (of an answer that always opens alike, the first token says
            little).
        questions, truths: one per example, asked under the method.
        templates: for the attributes that the texts name (`described_accuracy`), held against the examples'
            `.attributes`.
        repeats: pairs of runs for the latency; 0 measures none.
        lead_in: begun answer after which the drift is read.
        batch_size, max_new_tokens: of the answers.

    Raises: ValueError for no examples, or numbers that do not match."""
    model, asking = study.model, study.asking
    batch_size = asking.batch_size
    if not examples:
        raise ValueError("measure_side_effects: give at least one example.")
    said = texts
    if said is None:
        said = study.answers(examples, method)
    surprise = perplexity(model, examples, said, batch_size=batch_size)
    right = kl = ratio = named = None
    if templates:
        truth = [{name: str(value) for name, value in e.attributes.items()} for e in examples]
        named = _mean(described_accuracy(said, truth, templates))
    if questions or truths:
        right = _mean(attribute_accuracy(model, examples, questions, truths, method, batch_size=batch_size))
    if neutral:
        kl = _mean(kl_from_plain(model, neutral, method, asking.lead_in, batch_size=batch_size))
    if repeats:
        ratio = latency_ratio(model, examples, method, repeats=repeats, **asking.sizes)
    return SideEffects(
        method=method.name,
        n=len(examples),
        perplexity=math.exp(_mean(surprise.log())),
        distinct_1=_mean(distinct_n(said, 1)),
        distinct_2=_mean(distinct_n(said, 2)),
        repetition=_mean(repetition(said)),
        length=_mean(answer_lengths(said)),
        drift=kl,
        attributes=right,
        described=named,
        latency=ratio,
    )


def _mean(values: Tensor) -> float:
    """Return the mean of the entries that exist, NaN where none does."""
    there = values[~values.isnan()].tolist()
    return mean(there) if there else math.nan
