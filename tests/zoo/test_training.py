"""Packing and training: packed equals unpacked, a resumed run equals an uninterrupted one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from veena_lens.circuits.statistics import share
from veena_lens.zoo.architecture import Architecture, Row, Stage, pack
from veena_lens.zoo.evaluate import confusion
from veena_lens.zoo.llava import LLAVA
from veena_lens.zoo.model import ARCHITECTURES
from veena_lens.zoo.samples import Writer
from veena_lens.zoo.train import Trainer, answer_loss, learning_rate

MAIN_STYLE = {"avataaars": 1.0}


def stage(name: str, steps: int = 4) -> Stage:
    extra = 2 if name == "mix" else 0
    return Stage(name=name, steps=steps, batch=2, peak_lr=1e-3, head_weight=0.1, extra=extra)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_packed_loss_equals_unpacked(architecture: Architecture) -> None:
    processor = architecture.build_processor()
    model = architecture.build_model(processor, 0).double().eval()
    writer = Writer(processor.tokenizer, architecture.chat)
    texts = [
        [("how does the person feel?", "happy."), ("the hair?", "the hair is red.")],
        [("why?", "blue and green.")],
    ]
    pixels = torch.randn(2, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = architecture.grid(96, 96)
    rows = [writer.row(grid, [writer.branch([turn]) for turn in turns], "look.") for turns in texts]

    def loss(part: list[Row], pictures: torch.Tensor) -> tuple[torch.Tensor, float]:
        packed = pack(part, processor.tokenizer.pad_token_id)
        packed = replace(packed, attention_mask=packed.attention_mask.double(), weights=packed.weights.double())
        hidden = architecture.run(model, packed, pictures).hidden
        return answer_loss(model, hidden, packed.input_ids, packed.weights), packed.weights.sum().item()

    together, weight = loss(rows, pixels)
    alone = [
        loss([replace(row, branches=[branch])], pixels[i : i + 1])
        for i, row in enumerate(rows)
        for branch in row.branches
    ]
    torch.testing.assert_close(together * weight, sum(x * w for x, w in alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_row_is_what_the_processor_writes(architecture: Architecture) -> None:
    processor = architecture.build_processor()
    writer = Writer(processor.tokenizer, architecture.chat)
    turns = [("how does the person feel?", "happy, joyful."), ("are there glasses on the face?", "yes.")]
    branch = writer.branch(turns)
    row = writer.row(architecture.grid(96, 96), [branch], "look.")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "look."}]
    for number, (question, answer) in enumerate(turns):
        parts = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": parts if number else [{"type": "image"}, *parts]})
        messages.append({"role": "assistant", "content": answer})
    text = processor.apply_chat_template(messages)
    inputs = processor(images=[Image.new("RGB", (192, 192))], text=[text], return_tensors="pt")
    ids = row.prefix + branch.ids
    assert inputs["input_ids"][0, : len(ids)].tolist() == ids
    assert processor.tokenizer.decode(inputs["input_ids"][0, len(ids) :]).strip() == ""


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
@pytest.mark.parametrize("name", ["tower", "alignment", "mix"])
def test_resumed_run_equals_uninterrupted(name: str, architecture: Architecture, drawings: Path) -> None:
    def trainer(folder: str) -> Trainer:
        work = drawings / f"{architecture.name}-{name}-{folder}"
        return Trainer(work, styles=MAIN_STYLE, identities=4, device="cpu", architecture=architecture)

    whole = trainer("whole")
    whole.run_stage(stage(name), save_every=2)
    trainer("parts").run_stage(stage(name), save_every=2, stop_after=2)
    resumed = trainer("parts")
    resumed.run_stage(stage(name), save_every=2)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    before = architecture.build_model(whole.processor, 0).state_dict()
    first = next(name for name in before if name.endswith(("patch_embedding.weight", "patch_embed.proj.weight")))
    assert not torch.equal(whole.model.state_dict()[first], before[first])


def test_learning_rate_warms_up_and_falls() -> None:
    first, middle, last = (learning_rate(LLAVA.stages[0], step, p) for step, p in ((0, 0.0), (500, 0.1), (2900, 1.0)))
    assert first < middle and last == pytest.approx(0.02 * LLAVA.stages[0].peak_lr)


def test_share_has_its_interval_around_it() -> None:
    result = share([True] * 80 + [False] * 20, list(range(100)))
    assert result.value == 0.8 and 0.70 < result.low < 0.75 and 0.85 < result.high < 0.9
    assert share([True] * 10, list(range(10))).low == pytest.approx(0.722, abs=1e-3)
    assert confusion(["happy", "happy"], ["sad", None]) == {"happy": {"sad": 1, "none": 1}}
