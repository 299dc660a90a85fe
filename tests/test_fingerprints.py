"""Names by content: equal contents have equal names in every process, and other contents have others."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.emotion.asked import bundled, examples
from veena_lens import HookedVLM
from veena_lens.emotion import AnswerPosition
from veena_lens.emotion.enhance.veena import vee
from veena_lens.emotion.methods import Method
from veena_lens.emotion.pairs.pair_set import Example
from veena_lens.fingerprints import digest, fingerprint
from veena_lens.interventions import Ablate, BoostAttention, Steer
from veena_lens.sweeps.metrics import project, soft_hit

EMBEDDED = "tiny-llava-emotion"
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}


def own(scale: float) -> Any:
    return lambda logits: scale * logits[:, 0]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (own(1.0), own(2.0)),
        (lambda x: x[:, 0] + 1, lambda x: x[:, 0] + 2),
        (project("blocks.0.hook_resid_post", torch.ones(9)), project("blocks.0.hook_resid_post", torch.ones(9) + 1e-7)),
        (soft_hit([1], [[2]]), soft_hit([1], [[3]])),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.arange(2000).numpy(), torch.arange(2000).flip(0).numpy()),
        ({"a": [1, slice(0, 3)]}, {"a": [1, slice(0, 4)]}),
    ],
)
def test_other_contents_have_other_fingerprints(a: Any, b: Any) -> None:
    assert fingerprint(a) == fingerprint(a)
    assert fingerprint(a) != fingerprint(b) and digest(a) != digest(b)


def test_equal_functions_made_twice_are_the_same_metric() -> None:
    assert fingerprint(own(2.0)) == fingerprint(own(2.0))


def test_an_example_is_named_by_its_picture_s_content_and_its_prompt(tmp_path: Path) -> None:
    path = examples()[0].picture
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes(Path(path).read_bytes())

    def key(picture: Any, question: str = "How?", **more: Any) -> str:
        return fingerprint(Example(picture=picture, emotion="happy", question=question, **more))

    assert key(path) == key(str(path)) == key(copy) != key(examples()[1].picture)
    assert key(path) != key(path, "Why?") and key(path) != key(path, context="Alas.", context_emotion="sad")
    with Image.open(path) as opened:
        one, other = opened.convert("RGB"), opened.convert("RGB")
    assert one is not other and key(one) == key(other), "two copies in memory are one picture"
    assert fingerprint(one) == fingerprint(other)
    other.putpixel((0, 0), (1, 2, 3))
    assert key(one) != key(other) and fingerprint(one) != fingerprint(other)
    copy.write_bytes(Path(examples()[1].picture).read_bytes())
    assert key(copy) != key(path), "a file that changed is another picture"


def test_a_method_is_named_by_what_it_does() -> None:
    a, b = torch.randn(4, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    one = Method(name="one", interventions=vee([(1, 2)], 3.0), settings={"x": 1})
    assert fingerprint(one) == fingerprint(Method(name="two", interventions=list(vee([(1, 2)], 3.0))))
    others = [vee([(1, 3)], 3.0), vee([(1, 2)], 2.0), [Steer(1, a)], [Steer(1, b)], [Steer(1, b, 2.0)], []]
    keys = [digest(Method(name="one", interventions=x)) for x in others]
    assert len({*keys, digest(one)}) == 7
    long = [BoostAttention(1, heads=list(range(20))), BoostAttention(1, heads=[*range(9), 10, *range(10, 20)])]
    assert fingerprint(long[0]) != fingerprint(long[1]), "a repr would show both alike"
    in_code = [
        Method(name="m", prompt=str.upper, settings={"k": 1}),
        Method(name="m", prompt=str.lower, settings={"k": 1}),
        Method(name="m", interventions=lambda model, inputs: [], settings={"k": 1}),
        Method(name="m", interventions=lambda model, inputs: [[]], settings={"k": 1}),
        Method(name="m", interventions=[SimpleNamespace(a=1)], settings={"k": 1}),
        Method(name="m", interventions=[SimpleNamespace(a=2)], settings={"k": 1}),
    ]
    assert len({digest(method) for method in in_code}) == 6


def written(model: Any, name: str, how: str) -> None:
    """Change one number of a weight, by one of the ways that people use."""
    weight = model.get_parameter(name)
    if how == "data":
        weight.data[-1] += 1e-3
    elif how == "swapped":
        weight.data[:, [0, 1]] = weight.data[:, [1, 0]]
    elif how == "replaced":
        module, _, last = name.rpartition(".")
        new = weight.detach().clone()
        new[-1] += 1e-3
        setattr(model.get_submodule(module), last, torch.nn.Parameter(new))
    else:
        with torch.no_grad():
            weight[-1] += 1e-3


def test_a_model_is_another_once_any_of_its_weights_is() -> None:
    model = HookedVLM.from_pretrained(EMBEDDED)
    keys = [digest(model)]
    assert keys[0] == digest(bundled(EMBEDDED)) == digest(model) == digest(copy.deepcopy(model))
    for name, how in (
        ("blocks.3.attn.q.weight", "in place"),
        ("blocks.3.mlp.down.weight", "data"),
        ("unembed.weight", "data"),
        ("blocks.2.attn.o.weight", "swapped"),
        ("ln_final.weight", "replaced"),
    ):
        written(model, name, how)
        keys.append(digest(model))
    assert len(set(keys)) == len(keys)


def test_what_is_in_force_on_a_model_is_part_of_its_name() -> None:
    model = bundled(EMBEDDED)
    plain = digest(model)
    keys = [plain]

    def doubled(tensor: Any, hook: Any) -> Any:
        return 2 * tensor

    def halved(tensor: Any, hook: Any) -> Any:
        return tensor / 2

    for items in ([Ablate("blocks.1.hook_attn_out")], [Ablate("blocks.2.hook_attn_out")], [BoostAttention(1)]):
        with model.intervene(items):
            keys.append(digest(model))
            assert keys[-1] == digest(model)
    for hook in (doubled, halved, functools.partial(doubled), lambda tensor, hook: 3 * tensor):
        with model.hooks([("blocks.1.hook_resid_post", hook)]):
            keys.append(digest(model))
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    keys.append(digest(model))
    handle.remove()
    assert len(set(keys)) == len(keys) and digest(model) == plain


def test_slots_of_other_tokens_are_other_slots() -> None:
    def slot(**tokens: tuple[int, ...]) -> Any:
        return AnswerPosition(lead_in="The person feels", tokens=tokens)

    assert fingerprint(slot(a=(1, 2))) == fingerprint(slot(a=(1, 2))) != fingerprint(slot(a=(1, 3)))


# --- functions and objects ----------------------------------------------------------------------------

THRESHOLD = 1.0


def helper(x: Any) -> Any:
    return x + 1


def reads_a_global(logits: Any) -> Any:
    return logits[:, 0] * THRESHOLD


def calls_a_global(logits: Any) -> Any:
    return [helper(x) for x in logits]


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, logits: Any) -> Any:
        return self.scale * logits[:, 0]


class Stateful:
    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __call__(self, logits: Any) -> Any:
        return logits[:, len(self.words)]

    def measure(self, logits: Any) -> Any:
        return self(logits)


def test_a_function_is_another_where_what_it_reads_is(monkeypatch: pytest.MonkeyPatch) -> None:
    here = sys.modules[__name__]
    before = [digest(f) for f in (reads_a_global, calls_a_global)]
    assert before == [digest(f) for f in (reads_a_global, calls_a_global)]
    monkeypatch.setattr(here, "THRESHOLD", 2.0)
    assert digest(reads_a_global) != before[0] and digest(calls_a_global) == before[1]
    monkeypatch.setattr(here, "helper", lambda x: x + 2)
    assert digest(calls_a_global) != before[1]


def test_objects_are_named_by_class_code_and_state(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Slotted(1.0), Slotted(2.0), Stateful(["a"]), Stateful(["b"]), Stateful(["a"]).measure]
    keys = [digest(x) for x in made]
    assert len(set(keys)) == 5 and keys == [digest(copy.deepcopy(x)) for x in made]
    monkeypatch.setattr(Slotted, "__call__", lambda self, logits: logits[:, 1])
    assert digest(Slotted(1.0)) != keys[0]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    assert digest(generators[0]) == digest(generators[1]) != digest(generators[2])


def test_a_value_whose_content_cannot_be_told_is_refused_unless_it_is_named(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w") as file:
        for value in (file, threading.Lock(), (x for x in [1]), lambda logits: file.write("")):
            with pytest.raises(ValueError, match=r"cannot be told. Give it an attribute `fingerprint`"):
                fingerprint(value)

    def metric(logits: Any) -> Any:
        return file.name

    metric.fingerprint = "first version"  # type: ignore[attr-defined]
    assert fingerprint(metric) == "first version"


def test_values_that_hold_themselves_and_functions_that_call_themselves_have_names() -> None:
    def count(n: int) -> int:
        return count(n - 1) if n else 0

    loop: list[Any] = [1]
    loop.append(loop)
    assert digest(count) == digest(count) and digest(loop) == digest(loop)
    assert digest({1: "a"}) != digest({"1": "a"}) and digest({(0, 1): 2}) != digest({(1, 0): 2})


def test_names_are_the_same_in_every_process() -> None:
    code = (
        "import tests.test_fingerprints as t\n"
        "from veena_lens.fingerprints import digest\n"
        "values = [t.reads_a_global, t.calls_a_global, t.Slotted(1.0), t.Stateful(['a']), {'b', 'a', 'c'},\n"
        "          t.soft_hit([1], [[2]]), t.bundled(t.EMBEDDED), t.bundled(t.EMBEDDED).tokenizer]\n"
        "print(*map(digest, values))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, **ENV},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop().split()) == 8
