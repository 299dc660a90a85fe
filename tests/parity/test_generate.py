"""Generation against Hugging Face: greedy tokens, stopping, padding, cache or no cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from tests.cases import BY_NAME, IMAGE_TOKEN, PAD, QWEN, Case, build_hf, counted_inputs, raw_inputs
from tests.odd_inputs import QWEN_IMAGE, QWEN_VIDEO
from tests.parity.drawing import DRAWN, check_drawn
from tests.parity.runs import Say, cut, greedy, never_ends, talking_pair
from veena_lens import HookedVLM

LLAVA = [
    "clip-llama",
    "siglip-qwen2",
    "wide-heads",
    "both-biases-tied",
    "image-28-patch-7",
    "feature-list-full-ends",
    "rope-llama3",
    "rope-yarn",
    "window-mistral",
    "window-qwen2",
    "three-images-and-none",
    "no-picture-at-all",
    "text-llama",
    "text-mistral",
    "text-qwen2-window",
    "text-one-token",
]
OF_QWEN = ("plain", "image-and-video", "many-pictures", "long-video", "merge-3", "tied", "text-rows-between")
OF_QWEN += ("no-picture-at-all", "videos", "yarn", "thin-pictures")
NAMES = LLAVA + [f"{family}-{name}" for family in QWEN for name in OF_QWEN]
NAMES += [f"qwen2_5_vl-{name}" for name in ("slow-videos", "window-of-one-token")]
NAMES += [f"qwen3_vl-deepstack-{name}" for name in ("none", "every-decoder-layer", "video")]
NAMES += [f"qwen2_vl-{name}" for name in ("window", "one-head", "window-longer-than-rows")]
NAMES += [f"onevision-{n}" for n in ("plain", "resampled", "image-and-video", "tied", "many-pictures", "window")]
# Longer than every window of Gemma: Hugging Face's cache of a layer that slides forgets, ours is masked.
GEMMA = ["gemma3-narrow-window", "gemma3-unequal-rows", "gemma3-touching-pictures", "gemma3-ends-with-a-picture"]
GEMMA += ["gemma3-text-plain"]
NAMES += [*GEMMA, "llava-next-mistral"]
NAMES += ["idefics3-plain", "smolvlm-unequal-pictures", "smolvlm-long-names", "idefics3-qwen2"]
UNCACHED = ["clip-llama", "window-qwen2", "three-images-and-none", "rope-yarn", *GEMMA, "qwen2_vl-window"]
UNCACHED += [f"{family}-{name}" for family in QWEN for name in ("image-and-video", "long-video")]
SPECIAL = [("clip-llama", dict(image=IMAGE_TOKEN, pad=PAD, begin=1))]
SPECIAL += [(f"{family}-image-and-video", dict(image=QWEN_IMAGE, video=QWEN_VIDEO, pad=PAD)) for family in QWEN]
NEW = 40


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_hugging_face(name: str) -> None:
    raw = raw_inputs(BY_NAME[name])
    hf, model = talking_pair(BY_NAME[name])
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=NEW, do_sample=False, return_type="tokens")
    assert ours.shape == (len(BY_NAME[name].rows), NEW)
    assert ours.tolist() == greedy(hf, raw, max_new_tokens=NEW)
    assert len(set(ours.flatten().tolist())) > 4, "the model says too little for the test to show much"
    assert "idefics3" not in name or len({tuple(row) for row in ours.tolist()}) == len(ours), "rows say the same"


@pytest.mark.parametrize("family", DRAWN)
def test_drawn_configuration_generates_as_hugging_face(family: str) -> None:
    def check(case: Case) -> None:
        case = Case(**{**vars(case), "padding": "left"})
        raw = raw_inputs(case)
        hf, model = talking_pair(case, gain=2.0)
        ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=12, return_type="tokens")
        # Hugging Face's cache of a window of one token keeps all tokens: -0 is where it cuts.
        use_cache = case.text.get("sliding_window") != 1
        assert ours.tolist() == greedy(hf, raw, max_new_tokens=12, use_cache=use_cache)

    check_drawn(family, 6 if family == "onevision" else 8, check)


@pytest.mark.parametrize("name", UNCACHED)
def test_tokens_without_cache_equal_those_with_cache(name: str) -> None:
    case = BY_NAME[name]
    _, model = talking_pair(case)
    inputs = model.inputs_from_hf(**raw_inputs(case))
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, return_type="tokens")
    marks = [QWEN_IMAGE, QWEN_VIDEO] if case.has("any size") else [IMAGE_TOKEN]
    options["logits_processor"] = [SuppressTokensLogitsProcessor(marks)]
    cached = model.generate(inputs, **options)
    assert torch.equal(model.generate(inputs, use_past_kv_cache=False, **options), cached)


@pytest.mark.parametrize("name, token", [(n, t) for n, tokens in SPECIAL for t in tokens.values()])
def test_generated_special_token_is_a_token_like_any_other(name: str, token: int) -> None:
    """A model may say a placeholder: no image is looked for, with or without cache, and its text goes on."""
    hf, model = talking_pair(BY_NAME[name])
    raw = raw_inputs(BY_NAME[name])
    inputs, length = model.inputs_from_hf(**raw), raw["input_ids"].shape[1]
    options = dict(max_new_tokens=8, logits_processor=LogitsProcessorList([Say(token, length + 2)]))
    expected = greedy(hf, raw, **options)
    assert all(row[2] == token for row in expected)
    for cached in (True, False):
        ours = model.generate(inputs, do_sample=False, return_type="tokens", use_past_kv_cache=cached, **options)
        assert ours.tolist() == expected, f"use_past_kv_cache={cached}"


@pytest.mark.parametrize("pad", [PAD, None], ids=["pad-token", "padded-with-end-token"])
def test_generated_tokens_make_an_answer_whose_logits_say_them_again(pad: int | None) -> None:
    """`with_answer(generate(...))` is the run that was just made: teacher forced, it predicts the same tokens,
    also where rows ended at different lengths."""
    case = BY_NAME["three-images-and-none"]
    _hf, model = talking_pair(case)
    model.generation_config.pad_token_id = pad
    inputs = model.inputs_from_hf(**counted_inputs(case))
    options = dict(max_new_tokens=20, do_sample=False, return_type="tokens")
    free = model.generate(inputs, **options).tolist()
    end = next(t for t in free[0][3:] if any(t not in row for row in free))
    out = model.generate(inputs, eos_token_id=end, **options)
    forced = inputs.with_answer(out)
    with torch.no_grad():
        logits = model(forced)
    for row, tokens in enumerate(out.tolist()):
        n = tokens.index(end) + 1 if end in tokens else len(tokens)
        span = forced.spans[row].answer
        assert span.stop - span.start in (n, n - 1), "the answer is the row's own tokens, with or without its end token"
        n = span.stop - span.start
        assert forced.tokens[row, span].tolist() == tokens[:n]
        assert logits[row, span.start - 1 : span.stop - 1].float().argmax(-1).tolist() == tokens[:n]


def test_generation_stops_where_hugging_face_stops() -> None:
    """The end token is one that the model really says, early in one row and never in another."""
    case = BY_NAME["three-images-and-none"]
    hf, raw = never_ends(build_hf(case, gain=5.0)), raw_inputs(case)
    free = greedy(hf, raw, max_new_tokens=NEW)
    once = {token: [row.index(token) if token in row else NEW for row in free] for row in free for token in row}
    end = max(once, key=lambda token: len(set(once[token])))
    assert len(set(once[end])) > 1, "no token ends the rows at different lengths"
    hf.generation_config.eos_token_id = end
    model = HookedVLM.from_hf(hf)
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=NEW, do_sample=False, return_type="tokens")
    assert [cut(row, end) for row in ours.tolist()] == greedy(hf, raw, max_new_tokens=NEW)
    for row, whole in zip(ours.tolist(), free, strict=True):
        stop = whole.index(end) if end in whole else NEW
        assert row[:stop] == whole[:stop]
        assert all(token in (end, PAD) for token in row[stop:]), "a row goes on after its end token"


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("name", ["image-and-video", "long-video"])
def test_generated_tokens_of_streams_make_an_answer_whose_logits_say_them_again(family: str, name: str) -> None:
    """Positions of an answer go on where those of generation do."""
    _, model = talking_pair(BY_NAME[f"{family}-{name}"])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[f"{family}-{name}"]))
    options = dict(logits_processor=[SuppressTokensLogitsProcessor([QWEN_IMAGE, QWEN_VIDEO, PAD])])
    out = model.generate(inputs, max_new_tokens=20, return_type="tokens", **options)
    forced = inputs.with_answer(out)
    with torch.no_grad():
        logits = model(forced)
    logits[..., [QWEN_IMAGE, QWEN_VIDEO, PAD]] = -torch.inf
    for row, tokens in enumerate(out.tolist()):
        span = forced.spans[row].answer
        assert forced.tokens[row, span].tolist() == tokens
        assert logits[row, span.start - 1 : span.stop - 1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("family", QWEN)
def test_right_padded_prompt_generates_as_the_left_padded_one(family: str) -> None:
    _, model = talking_pair(BY_NAME[f"{family}-videos"])
    left, right = (
        model.inputs_from_hf(**raw_inputs(BY_NAME[f"{family}-{name}"])) for name in ("videos", "videos-right-padding")
    )
    options = dict(max_new_tokens=15, return_type="tokens")
    assert torch.equal(model.generate(left, **options), model.generate(right, **options))


@pytest.mark.parametrize(
    "name",
    ["clip-llama", "three-images-and-none", "text-llama"]
    + [f"{family}-{name}" for family in QWEN for name in ("image-and-video", "text-rows-between")],
)
def test_row_generates_the_same_alone(name: str) -> None:
    """With the batch's pads, and without them where positions are counted over real tokens."""
    _, model = talking_pair(BY_NAME[name])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[name]))
    options: dict[str, Any] = dict(max_new_tokens=15, do_sample=False, return_type="tokens")
    together = model.generate(inputs, **options)
    for row in range(len(inputs)):
        alone = inputs[row].without_padding() if BY_NAME[name].has("streams") else inputs[row]
        assert model.generate(alone, **options).tolist() == together[row : row + 1].tolist()


def test_logits_processors_of_transformers_are_used() -> None:
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    hf, model = talking_pair(BY_NAME["clip-llama"])
    raw = raw_inputs(BY_NAME["clip-llama"])
    inputs = model.inputs_from_hf(**raw)
    plain = model.generate(inputs, max_new_tokens=20, do_sample=False, return_type="tokens").tolist()
    changed = []
    for make in (lambda: NoRepeatNGramLogitsProcessor(2), lambda: RepetitionPenaltyLogitsProcessor(2.0)):
        options = dict(max_new_tokens=20, logits_processor=LogitsProcessorList([make()]))
        ours = model.generate(inputs, do_sample=False, return_type="tokens", **options).tolist()
        assert ours == greedy(hf, raw, **options)
        changed.append(ours != plain)
    assert any(changed), "neither processor changed a token, so the test shows nothing"


def test_stopping_criteria_of_transformers_are_used() -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kw: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= length)

    _, model = talking_pair(BY_NAME["clip-llama"])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"]))
    length = inputs.shape[1] + 7
    options = dict(do_sample=False, return_type="tokens", max_new_tokens=20)
    whole = model.generate(inputs, **options)
    ours = model.generate(inputs, stopping_criteria=StoppingCriteriaList([AtLength()]), **options)
    assert ours.tolist() == whole[:, :7].tolist()


def test_sampling_is_reproducible_by_seed() -> None:
    _, model = talking_pair(BY_NAME["clip-llama"])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"]))
    options = dict(max_new_tokens=20, do_sample=True, return_type="tokens")
    first, again, other = (model.generate(inputs, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, model.generate(inputs, max_new_tokens=20, do_sample=False, return_type="tokens"))


def test_generate_leaves_model_as_it_was(model_of) -> None:
    model = model_of(BY_NAME["clip-llama"])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"]))
    with torch.no_grad():
        before = model(inputs)
    model.generate(inputs, max_new_tokens=5, do_sample=False, return_type="tokens")
    with torch.no_grad():
        assert torch.equal(model(inputs), before)


@pytest.mark.parametrize(
    "settings",
    [
        dict(repetition_penalty=1.5),
        dict(no_repeat_ngram_size=2),
        dict(eos_token_id=61, min_new_tokens=11),
        dict(eos_token_id=[61, 43, 17]),
        dict(repetition_penalty=0.8, no_repeat_ngram_size=3, eos_token_id=[61]),
        dict(bad_words_ids=[[61], [43, 17]], suppress_tokens=[9, 12], begin_suppress_tokens=[5], eos_token_id=[2]),
    ],
    ids=str,
)
def test_generation_config_of_the_checkpoint_is_followed(settings: dict[str, Any]) -> None:
    case = BY_NAME["clip-llama"]
    hf, raw = never_ends(build_hf(case, gain=5.0)), raw_inputs(case)
    free = greedy(hf, raw, max_new_tokens=30)
    for name, value in settings.items():
        setattr(hf.generation_config, name, value)
    expected = greedy(hf, raw, max_new_tokens=30)
    assert expected != free, "the settings changed nothing, so the test shows nothing"
    model = HookedVLM.from_hf(hf)
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=30, return_type="tokens")
    assert [cut(row, hf.generation_config.eos_token_id) for row in ours.tolist()] == expected


@pytest.mark.parametrize("setting", [dict(num_beams=3), dict(num_return_sequences=2)], ids=str)
def test_a_setting_that_is_not_followed_is_refused_by_name(setting: dict[str, Any]) -> None:
    case = BY_NAME["clip-llama"]
    model = HookedVLM.from_hf(build_hf(case))
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=next(iter(setting))):
        model.generate(model.inputs_from_hf(**raw_inputs(case)), return_type="tokens")
