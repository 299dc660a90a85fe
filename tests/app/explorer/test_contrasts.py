"""Two sets of images, or two prompts, make a direction that steers, ranks neurons and runs as a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.app.explorer.conftest import NAME, QUESTION
from veena_lens.app.explorer import contrasts, directions, neurons, steer
from veena_lens.app.explorer.directions import DirectionSettings
from veena_lens.app.explorer.pictures import open_sample, samples
from veena_lens.app.explorer.state import Explorer, Limits, Session
from veena_lens.checkpoints.files import bundled_pairs

PAIRS = [pair for pair in bundled_pairs("development") if pair[0].emotion == "sad"]


def kept_direction(explorer: Explorer, session: Session, contrast: contrasts.Contrast) -> directions.Direction:
    asked = DirectionSettings(model=NAME, emotion=contrast.name, contrast=contrast.fingerprint)
    return directions.extract(explorer, session, asked)


def test_two_sets_of_unequal_size_give_the_difference_of_their_means(
    explorer: Explorer, session: Session, run_code: Any
) -> None:
    first, second = ([str(pair[i].path) for pair in PAIRS[:n]] for i, n in ((0, 3), (1, 2)))
    contrast = contrasts.take_images(session, first, second, " crying ", Limits(), QUESTION, "the person feels ")
    found = kept_direction(explorer, session, contrast)
    with explorer.using(NAME) as model:
        states = []
        for files in (first, second):
            rows = []
            for file in files:
                inputs = model.prepare(text=QUESTION, images=file, answer="the person feels")
                _, cache = model.run_with_cache(inputs, names_filter="blocks.4.hook_resid_post")
                rows.append(cache["resid_post", 4][0, -1])
            states.append(torch.stack(rows).double().mean(0))
    torch.testing.assert_close(found.vectors[4], (states[0] - states[1]).float(), rtol=1e-4, atol=1e-5)
    assert (found.emotion, found.n_pairs, found.n_given) == ("crying", 3, 2) and len(found.neurons) == 30
    assert "3 images against 2" in steer.describe_direction(found)
    circuit = steer.circuit_from(found, 4, 1, 1, 1)
    calm = open_sample(next(name for name in samples() if name.startswith("neutral")))
    steered = steer.steer(explorer, session, NAME, circuit, calm, QUESTION, "crying", judged=False)
    assert "sad" in steered.after and steered.rate_after is None and "hit" not in steer.compared(steered)
    layer, neuron, _ = found.neurons[0]
    tokens, images, code = neurons.look_at_neuron(explorer, found, layer, neuron)
    assert len(tokens) == 12 and 1 <= len(images) <= 5 and images[0][1].startswith("00")
    (archive,) = contrasts.export_sets(session)
    import zipfile

    zipfile.ZipFile(archive).extractall(Path.cwd())
    made = run_code(code)
    assert torch.equal(made["direction"], found.vectors) and made["neurons"] == found.neurons
    contrasts.forget(session)
    with pytest.raises(ValueError, match="replaced or removed"):
        kept_direction(explorer, session, contrast)


def test_two_prompts_make_a_direction(explorer: Explorer, session: Session) -> None:
    contrast = contrasts.take_prompts(session, "a happy person", "a sad person", "", Limits())
    found = kept_direction(explorer, session, contrast)
    assert contrast.name == "first prompt" and found.vectors.shape == (8, 192) and len(found.heads) == 10
    assert "from two prompts" in steer.describe_direction(found) and contrasts.export_sets(session) == []


def test_what_makes_no_direction_is_told(explorer: Explorer, session: Session, tmp_path: Path) -> None:
    image = str(PAIRS[0][0].path)
    with pytest.raises(ValueError, match="needs images on both sides; got 1 and 0"):
        contrasts.take_images(session, [image], None, "", Limits())
    with pytest.raises(ValueError, match="2 images were given on one side; the limit here is 1"):
        contrasts.take_images(session, [image] * 2, [image], "", Limits(pairs=1))
    with pytest.raises(ValueError, match="Write two different prompts"):
        contrasts.take_prompts(session, "the same", "the same ", "", Limits())
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    with pytest.raises(ValueError, match=r"^bad.png cannot be read as an image"):
        contrasts.take_images(session, [image], [str(bad)], "", Limits())
    assert "contrast" not in session.kept and not list(session.folder.iterdir())
    same = contrasts.take_images(session, [image], [image], "", Limits())
    with pytest.raises(ValueError, match="leave the model in the same state"):
        kept_direction(explorer, session, same)
