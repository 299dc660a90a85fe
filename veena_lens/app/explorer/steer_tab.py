"""The Steer tab: a direction or a circuit, its strengths, the image to steer, and the answers before and after."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gradio as gr

from veena_lens.app.explorer import contrasts, directions, own_pairs
from veena_lens.app.explorer.directions import BEGUN, FELT, LISTED
from veena_lens.app.explorer.examples import Example, example
from veena_lens.app.explorer.look import asked_in_words
from veena_lens.app.explorer.parts import Shared, code_box, export_box, file_box
from veena_lens.app.explorer.pictures import chosen, open_sample, open_upload, samples, thumbnails
from veena_lens.app.explorer.state import Explorer, Session, reading, report_errors, takes
from veena_lens.app.explorer.status import Status
from veena_lens.app.explorer.steer import (
    Choices,
    circuit_from,
    compared,
    describe_direction,
    export_steering,
    load_circuit,
    loaded_at,
    side,
    steer,
)
from veena_lens.app.questions import FEELING
from veena_lens.emotion import sample_hit
from veena_lens.interventions import Circuit
from veena_lens.scores import counted

MOST_SAMPLES = 24  # sample pairs of an emotion
SHOWN_PAIRS = 6
SAMPLES_RESTORED = "Back to the sample faces."


def sides_of(sample: Example) -> str:
    """Return the answers of the example, as `compared` shows those of a run."""
    found = sample.sides
    image = thumbnails([(open_sample(found["image"]).image, found["image"])], 110)
    both = (
        side(title, found[name], found["wanted"], sample_hit(found[name], found["wanted"]) > 0.5, found[f"rate_{name}"])
        for title, name in (("Before", "before"), ("After", "after"))
    )
    return f'<div class="veena-steered">{image}<div class="veena-sides">{"".join(both)}</div></div>'


def own_now(session: Session) -> Any:
    """Return what tells a visitor's own pairs, sets, prompts and circuit from others."""
    own, contrast = session.kept.get("own_pairs"), session.kept.get("contrast")
    circuit = session.kept.get("circuit")
    return own and own.pairs.fingerprint, contrast and contrast.fingerprint, circuit and id(circuit)


def build(shared: Shared) -> None:
    """Build the tab's components and say what they do."""
    explorer = shared.explorer
    status = shared.status("steer", also=own_now)
    neutral = next((name for name in samples() if name.startswith("neutral")), shared.first_sample)
    gr.Markdown(
        "Does the model say something else when a direction is added to its residual stream? The direction is the "
        "difference between images with an emotion and the same without it, or between any two sets of images or two "
        "prompts of your own.",
        elem_classes="veena-asks",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=260):
            emotion = gr.Dropdown(list(FELT), value="happy", label="Direction of", elem_id="emotion")
            n_pairs = gr.Slider(1, MOST_SAMPLES, 8, step=1, label="Maximum number of pairs", elem_id="n-pairs")
            place = gr.Radio([BEGUN, LISTED], value=BEGUN, label="Where the state is read", elem_id="reading")
            apart = gr.Checkbox(True, label="Only pairs that the model answers correctly", elem_id="apart")
            with gr.Accordion("Images, pairs or prompts of your own", open=False, elem_id="own"):
                own_box(explorer, status.part("own"), emotion, n_pairs)
            extract = gr.Button("Extract the direction", elem_id="extract")
            file = file_box("or a circuit (.safetensors)", "circuit")
            of_direction = status.part("direction")
            of_direction.place_notice()
            found_text = gr.Markdown("", elem_id="direction")
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                with gr.Column(scale=2, min_width=180):
                    sample = gr.Dropdown(list(samples()), value=neutral, label="Image to steer", elem_id="steer-sample")
                    upload = file_box("or your own", "steer-upload")
                thumbs = gr.HTML(elem_id="steer-thumbs", apply_default_css=False)
            prompt = gr.Textbox(FEELING, label="Question", elem_id="steer-prompt")
            layer = gr.Slider(0, 7, 4, step=1, label="Layer", elem_id="layer")
            alpha = gr.Slider(-4, 8, 1, step=0.1, label="alpha: scales the added direction (0: off)", elem_id="alpha")
            beta = gr.Slider(
                0.2, 5, 1, step=0.1, label="beta: scales key heads' attention to the image (1: off)", elem_id="beta"
            )
            gamma = gr.Slider(0, 5, 1, step=0.1, label="gamma: scales the key neurons (1: off)", elem_id="gamma")
            go = gr.Button("Steer", variant="primary", elem_id="steer")
            status.place_notice()
    shown = example()
    told = f"tiny-llava-emotion · {shown.sides['image']} · “{FEELING}” · happy, layer 4, alpha 1"
    status.place_origin(f"Example, computed beforehand: {told}.")
    sides = gr.HTML(sides_of(shown), elem_id="sides", apply_default_css=False)
    code = code_box("steer-code")

    @report_errors
    def preview(path: str | None, name: str, request: gr.Request) -> str:
        explorer.own(explorer.session(request.session_hash), path)
        (image,) = chosen([path] if path else None, name, explorer.limits)
        return thumbnails([(image.image, Path(image.name).name)], 110)

    @takes(explorer, Choices)
    def extracted(choices: Choices, session: Session) -> tuple[Any, Any]:
        direction = directions.extract(explorer, session, choices.direction(session))
        session.kept.pop("circuit", None)
        last = len(direction.vectors) - 1
        return describe_direction(direction), gr.update(maximum=last, value=min(last, round(0.6 * last)))

    @report_errors
    def loaded(path: str | None, request: gr.Request) -> str:
        session = explorer.session(request.session_hash)
        if not path:
            session.kept.pop("circuit", None)
            return "No circuit."
        explorer.own(session, path)
        session.kept.pop("circuit", None)  # a file that cannot be read does not leave the one before in force
        found = load_circuit(session, path)
        kinds = ", ".join(sorted({type(item).__name__ for item in found}))
        edits = counted(len(found), "edit")
        return f"Circuit **{found.name or 'unnamed'}**: {edits} ({kinds}); the strengths set here apply to them."

    @takes(explorer, Choices)
    def steered(choices: Choices, session: Session) -> tuple[Any, Any, Any, Any]:
        explorer.own(session, choices.upload)
        status.begins(session)
        uploads = [choices.upload] if choices.upload else None
        image = chosen(uploads, choices.sample, explorer.limits)[0]
        given: Circuit | None = session.kept.get("circuit")
        judged, last = True, gr.skip()
        if given is not None:
            wanted, text = given.meta.get("emotion", choices.emotion), gr.skip()
            judged = not given.meta.get("contrast", False)
            circuit, source = loaded_at(given, **choices.strengths), f"circuit {given.name or 'unnamed'}"
        else:
            settings, direction = choices.direction(session), session.kept.get("direction")
            if direction is None or direction.settings != settings:
                direction = directions.extract(explorer, session, settings)
            wanted, text, judged = choices.emotion, describe_direction(direction), not settings.contrast
            last = gr.update(maximum=len(direction.vectors) - 1)
            circuit = circuit_from(direction, int(choices.layer), **choices.strengths)
            source = f"{wanted}, layer {int(choices.layer)}"
        with reading("the circuit", "a circuit of this model") if given is not None else nullcontext():
            found = steer(explorer, session, choices.model, circuit, image, choices.question, wanted, judged)
        strengths = ", ".join(f"{name} {value:g}" for name, value in choices.strengths.items())
        asked = asked_in_words(choices.model, [Path(image.name).name], choices.question)
        status.shows(session, tuple(vars(choices).values()), f"{asked} · {source}, {strengths}")
        return compared(found), text, found.code, last

    ways = [shared.model, emotion, n_pairs, place, apart]
    of_direction.listen([extract.click], extracted, ways, [found_text, layer], clears=[found_text])
    of_direction.listen([file.change], loaded, file, found_text, clears=[found_text])
    sources = [*ways, sample, upload, prompt, layer, alpha, beta, gamma]
    status.listen([go.click], steered, sources, [sides, found_text, code, layer], show_progress_on=[sides])
    status.watch(sources)
    changes = [sample.change, upload.change]
    status.listen(changes, preview, [upload, sample], thumbs, clears=[thumbs], show_progress="hidden")
    shared.loads.append((preview, [upload, sample], [thumbs]))

    def files(session: Session) -> list[str]:
        return export_steering(session) + own_pairs.export_pairs(session) + contrasts.export_sets(session)

    export_box("steer", files, explorer, status)


def own_box(explorer: Explorer, status: Status, emotion: Any, n_pairs: Any) -> None:
    """Build where visitors give their own images or prompts; `emotion` and `n_pairs` then offer what these hold."""
    gr.Markdown(
        "**Pairs with an emotion:** the same people or scenes with and without it, paired by file name or by order; or "
        "a .zip with one folder per emotion and one named neutral, or with a manifest.jsonl. **Two sets:** any images "
        "with something and any without it, in any numbers. **Two prompts:** without images.",
        elem_classes="veena-hint",
    )
    shown = file_box("Images with the emotion (or the first set)", "own-shown", several=True)
    twins = file_box("The same without it (or the second set)", "own-twins", several=True)
    archive = file_box("or one .zip", "own-zip")
    word = gr.Textbox("", label="Name: the emotion, or whatever differs", placeholder="happy", elem_id="own-word")
    asks = gr.Textbox(FEELING, label="Question about each image of two sets", elem_id="own-asks")
    lead_in = gr.Textbox(
        directions.LEAD_IN, label="Begin its answer with (the state is read after it; may be empty)", elem_id="own-lead"
    )
    with gr.Row():
        use = gr.Button("Use these pairs", elem_id="own-use", min_width=110)
        use_sets = gr.Button("Use as two sets", elem_id="own-sets", min_width=110)
    first_prompt = gr.Textbox("", label="First prompt", placeholder="I am overjoyed.", elem_id="own-first")
    second_prompt = gr.Textbox("", label="Second prompt", placeholder="I am calm.", elem_id="own-second")
    with gr.Row():
        use_prompts = gr.Button("Use two prompts", elem_id="own-prompts", min_width=110)
        back = gr.Button("Back to the sample faces", elem_id="own-back", min_width=110)
    status.place_notice()
    status_text = gr.Markdown("", elem_id="own-status")
    thumbs = gr.HTML(elem_id="own-thumbs", apply_default_css=False)

    @report_errors
    def given(
        first: list[str] | None, second: list[str] | None, path: str | None, name: str, request: gr.Request
    ) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        for files in (first, second, path):
            explorer.own(session, files)
        if path:
            found = own_pairs.take_zip(session, path, explorer.limits)
        else:
            found = own_pairs.take_sets(session, first, second, name, explorer.limits)
        contrasts.forget(session)
        emotions = found.pairs.emotions
        most = max(sum(p.emotion == e for p in found.pairs) for e in emotions)
        few = [(e.open(), e.emotion) for pair in found.pairs[:SHOWN_PAIRS] for e in (pair.emotional, pair.neutral)]
        choices = gr.update(choices=emotions, value=emotions[0])
        return found.describe(), thumbnails(few, 72), choices, gr.update(maximum=max(2, most), value=most)

    def contrasted(session: Session, found: contrasts.Contrast) -> tuple[Any, ...]:
        own_pairs.forget_pairs(session)
        few = [
            (open_upload(file, explorer.limits).image, f"{side} set")
            for side, files in zip(contrasts.SIDES, found.images(), strict=False)
            for file in files[:SHOWN_PAIRS]
        ]
        return found.describe(), thumbnails(few, 72), gr.update(choices=[found.name], value=found.name), gr.skip()

    @report_errors
    def sets_given(
        first: list[str] | None,
        second: list[str] | None,
        name: str,
        question: str,
        begun: str,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        for files in (first, second):
            explorer.own(session, files)
        found = contrasts.take_images(session, first, second, name, explorer.limits, question, begun)
        return contrasted(session, found)

    @report_errors
    def prompts_given(first: str, second: str, name: str, request: gr.Request) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        return contrasted(session, contrasts.take_prompts(session, first, second, name, explorer.limits))

    @report_errors
    def returned(request: gr.Request) -> tuple[Any, ...]:
        session = explorer.session(request.session_hash)
        own_pairs.forget_pairs(session)
        contrasts.forget(session)
        choices = gr.update(choices=list(FELT), value="happy")
        return None, None, None, SAMPLES_RESTORED, "", choices, gr.update(maximum=MOST_SAMPLES, value=8)

    outputs = [status_text, thumbs, emotion, n_pairs]

    texts: dict[str, Any] = {"clears": [status_text, thumbs], "keeps": True}
    status.listen([use.click], given, [shown, twins, archive, word], outputs, **texts)
    status.listen([use_sets.click], sets_given, [shown, twins, word, asks, lead_in], outputs, **texts)
    status.listen([use_prompts.click], prompts_given, [first_prompt, second_prompt, word], outputs, **texts)
    status.listen([back.click], returned, None, [shown, twins, archive, *outputs])
