"""Frames and faces: which are taken, from where, and in which colours."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.emotion.mer_unibench.synthetic import Made, place_of
from veena_lens.emotion.mer_unibench import Sample, frame_places, load_set, read_faces, see
from veena_lens.emotion.mer_unibench.media import find_video

pytestmark = pytest.mark.filterwarnings("ignore:.*published test part")


def _sample(made: Made, key: str, number: int = 0) -> Sample:
    return load_set(made.root, key).samples[number]


@given(st.integers(1, 3000), st.integers(2, 20))
def test_uniform_places_are_the_reference_s(total: int, frames: int) -> None:
    places = frame_places(total, frames)
    taken = min(total, frames)
    step = Fraction(total, taken)
    assert places[:taken] == [int(k * step) for k in range(taken)]
    assert places[taken:] == [places[taken - 1]] * (frames - taken)


def test_one_frame_is_the_middle_one() -> None:
    assert [frame_places(total, 1) for total in (1, 2, 3, 9, 100)] == [[0], [1], [1], [4], [50]]
    assert frame_places(16, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    with pytest.raises(ValueError, match="at least 1"):
        frame_places(3, 0)


def test_the_middle_frame_of_a_folder_is_seen_and_recorded(made: Made) -> None:
    sample = _sample(made, "cmumosei")
    assert sample.name.startswith("-")
    seen = see(sample)
    assert seen.pictures[0].getpixel((3, 3)) == (200, 0, 0)
    assert seen.record() == {"kind": "frames", "places": [1], "total": 3, "source": f"subvideo/{sample.name}"}
    # Frames 8, 9, 10 by number, not by letter.
    colours = [picture.getpixel((0, 0)) for picture in see(sample, frames=3).pictures]
    assert colours == [(0, 0, 90), (200, 0, 0), (0, 90, 0)]


def test_frames_are_upright_and_transparent_places_white(own: Made) -> None:
    sample, tag = _sample(own, "cmumosei"), Image.Exif()
    folder, tag[0x0112] = find_video(sample), 6
    for path in folder.iterdir():
        path.unlink()
    image = Image.new("RGBA", (8, 4), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 1, 4))
    image.save(folder / "1.png", exif=tag)
    frame = see(sample).pictures[0]
    assert (frame.mode, frame.size) == ("RGB", (4, 8))
    assert frame.getpixel((2, 0)) == (255, 255, 255) and frame.getpixel((2, 7)) == (200, 0, 0)


@pytest.mark.parametrize("key", ["mer2023", "iemocapfour"])
def test_faces_are_read_as_rgb_from_both_layouts(made: Made, key: str) -> None:
    seen = see(_sample(made, key), faces=True)
    assert seen.pictures[0].getpixel((2, 2)) == (0, 4, 250)
    assert (seen.kind, seen.places, seen.total) == ("faces", (4,), 9)
    crops, path = read_faces(_sample(made, key))
    assert path.parent.name == ("openface_face" if key == "mer2023" else _sample(made, key).name)
    assert crops.dtype == np.uint8 and crops.shape[-1] == 3


def test_a_clip_without_a_face_falls_back_to_its_frames_and_says_so(made: Made) -> None:
    seen = see(_sample(made, "meld", 1), faces=True)
    assert seen.kind == "frames"
    assert seen.note == "meld_0001.npy holds no face; its frames were taken instead"


def test_an_uncropped_video_is_told(made: Made) -> None:
    assert "others than the speaker" in see(_sample(made, "iemocapfour")).note


@pytest.mark.parametrize(
    "array", [np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8, 3), np.float32), np.zeros((3, 0, 8, 3), np.uint8)]
)
def test_faces_of_another_rank_or_dtype_are_refused(own: Made, array: np.ndarray) -> None:
    at = place_of(own, "meld") / "openface_face"
    at.mkdir()
    np.save(at / "meld_0000.npy", array)
    with pytest.raises(ValueError, match=r"expected faces \[n height width 3\].*faces=False"):
        see(_sample(own, "meld"), faces=True)


def test_faces_that_are_a_pickle_are_refused(own: Made) -> None:
    at = place_of(own, "meld") / "openface_face"
    at.mkdir()
    np.save(at / "meld_0000.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="meld_0000.npy cannot be read as an array"):
        see(_sample(own, "meld"), faces=True)


def test_a_lost_video_names_the_paths_tried(own: Made) -> None:
    for path in (place_of(own, "cmumosei") / "subvideo" / "yt1-_a_1").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"subvideo_new/yt1-_a_1\.\{mp4,avi,mkv,webm,mov\}.*subvideo/yt1"):
        see(_sample(own, "cmumosei", 1))


def test_a_frame_that_is_no_picture_is_named(own: Made) -> None:
    (place_of(own, "meld") / "subvideo" / "meld_0000" / "9.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="9.png cannot be read as an image"):
        see(_sample(own, "meld"))


def test_a_video_without_a_decoder_names_the_extra(own: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    (place_of(own, "meld") / "subvideo" / "meld_0000.avi").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"veena-lens\[video\].*frames as pictures"):
        see(_sample(own, "meld"))


def _write_video(path: Path, frames: int = 5) -> None:
    av = pytest.importorskip("av", reason="video files need the extra `video`")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(frames):
            picture = Image.new("RGB", (32, 32), (200, 0, 0) if i == frames // 2 else (0, 0, 200))
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.mark.parametrize("ending", ["mp4", "avi"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_middle_frame_of_a_video_file_is_decoded(own: Made, ending: str) -> None:
    path = place_of(own, "meld") / "subvideo" / f"meld_0000.{ending}"
    _write_video(path)
    assert find_video(_sample(own, "meld")) == path
    seen = see(_sample(own, "meld"))
    red, _, blue = seen.pictures[0].getpixel((16, 16))
    assert red > 150 and blue < 80
    assert seen.record()["places"] == [2] and seen.total == 5
    assert len(see(_sample(own, "meld"), frames=8).pictures) == 8


def test_a_damaged_video_is_named(own: Made) -> None:
    pytest.importorskip("av", reason="video files need the extra `video`")
    path = place_of(own, "meld") / "subvideo" / "meld_0000.mp4"
    path.write_bytes(b"no video at all")
    with pytest.raises(ValueError, match="meld_0000.mp4 cannot be decoded"):
        see(_sample(own, "meld"))
