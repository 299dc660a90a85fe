"""Packing and training: packed equals unpacked, a resumed run equals an uninterrupted one."""

from pathlib import Path

import pytest
import torch

from veena_lens.zoo.model import build_model, build_processor
from veena_lens.zoo.packing import Branch, Row, pack
from veena_lens.zoo.statistics import confusion, share
from veena_lens.zoo.train import STAGES, Stage, Trainer, answer_loss, learning_rate

MAIN_STYLE = {"avataaars": 1.0}


def stage(name: str, steps: int = 4) -> Stage:
    return Stage(name=name, steps=steps, batch=2, peak_lr=1e-3, head_weight=0.1)


def test_packed_loss_equals_unpacked() -> None:
    processor = build_processor()
    model = build_model(processor).double().eval()
    ids = lambda text: processor.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    image = [model.config.image_token_id] * 64
    rows = [
        Row(
            [1, *ids("user:"), *image],
            [Branch(ids(text), [0.0] * 4 + [1.0 + n] * (len(ids(text)) - 4)) for n, text in enumerate(texts)],
        )
        for texts in (["how does the person feel? happy.", "the hair is red."], ["the background is blue and green."])
    ]
    pixels = torch.randn(2, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(part: list[Row], pictures: torch.Tensor) -> tuple[torch.Tensor, float]:
        packed = pack(part, processor.tokenizer.pad_token_id)
        hidden = model.model(
            input_ids=packed.input_ids,
            pixel_values=pictures,
            attention_mask=packed.attention_mask.double(),
            position_ids=packed.position_ids,
            use_cache=False,
        ).last_hidden_state
        return answer_loss(model, hidden, packed.input_ids, packed.weights.double()), packed.weights.sum().item()

    together, weight = loss(rows, pixels)
    alone = [
        loss([Row(row.prefix, [branch])], pixels[i : i + 1]) for i, row in enumerate(rows) for branch in row.branches
    ]
    torch.testing.assert_close(together * weight, sum(x * w for x, w in alone), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("name", ["tower", "alignment", "mix"])
def test_resumed_run_equals_uninterrupted(name: str, drawings: Path) -> None:
    def trainer(folder: str) -> Trainer:
        return Trainer(drawings / f"{name}-{folder}", styles=MAIN_STYLE, identities=4, device="cpu")

    whole = trainer("whole")
    whole.run_stage(stage(name), save_every=2)
    trainer("parts").run_stage(stage(name), save_every=2, stop_after=2)
    resumed = trainer("parts")
    resumed.run_stage(stage(name), save_every=2)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    untrained = build_model(whole.processor, 0)
    assert not torch.equal(whole.model.model.vision_tower.embeddings.patch_embedding.weight,
                           untrained.model.vision_tower.embeddings.patch_embedding.weight)  # fmt: skip


def test_learning_rate_warms_up_and_falls() -> None:
    first, middle, last = (learning_rate(STAGES[0], step, p) for step, p in ((0, 0.0), (500, 0.1), (2900, 1.0)))
    assert first < middle and last == pytest.approx(0.02 * STAGES[0].peak_lr)


def test_share_has_its_interval_around_it() -> None:
    result = share([True] * 80 + [False] * 20, list(range(100)))
    assert result.value == 0.8 and 0.70 < result.low < 0.75 and 0.85 < result.high < 0.9
    assert share([True] * 10, list(range(10))).low == pytest.approx(0.722, abs=1e-3)
    assert confusion(["happy", "happy"], ["sad", None]) == {"happy": {"sad": 1, "none": 1}}
