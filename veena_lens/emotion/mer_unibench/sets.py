"""The nine sets as a table: where each lies, what its labels look like, how many there are, and who gives it out.

Paths, columns and counts are those that AffectGPT's public code and the published label files use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

Kind = Literal["open", "emotion", "sentiment"]

MER_WORDS = ("worried", "happy", "neutral", "angry", "surprise", "sad")
IEMOCAP_WORDS = ("happy", "sad", "neutral", "anger")  # in the order of the integer labels
MELD_WORDS = ("anger", "joy", "sadness", "neutral", "disgust", "fear", "surprise")

PROCESSED = (
    "the processed sets linked in AffectGPT's readme (Baidu 1kbfs5pG_hAri0QwvQl-Ecg, TeraBox 1AE7uAU3Ib8aRBSyF1TMpow)"
)
_EULA = "after an EULA; academic research only, samples may not be edited or passed on"
_POLISHED = (("transcription-engchi-polish.csv",), "english")


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """One set. `key` is the reference's name for it; files and folders are tried in the order given."""

    key: str
    title: str
    kind: Kind
    folders: tuple[str, ...]
    label_file: str
    array: str = ""  # in the label file; "" for a csv
    count: int  # samples of the test part
    classes: tuple[str, ...] = ()  # of the labels; in the order of integer labels where these are integers
    integers: bool = False
    session: str = ""  # the fifth letter of the test part's names, where the file holds more
    bound: float = 0.0  # sentiment values lie in [-bound, bound]
    subtitles: tuple[tuple[str, ...], str] = _POLISHED  # (files, column)
    videos: tuple[str, ...] = ("video",)
    endings: tuple[str, ...] = ("mp4", "avi")
    uncropped: tuple[str, ...] = field(default=())  # video folders that show more than the speaker
    source: str = ""
    terms: str = ""

    @property
    def metric(self) -> str:
        """The set's primary metric: HIT, F_s or WAF."""
        return {"open": "F_s", "emotion": "HIT", "sentiment": "WAF"}[self.kind]

    def __repr__(self) -> str:
        return f"SetInfo({self.key!r}: {self.title}, {self.count} samples, {self.metric})"


SETS: tuple[SetInfo, ...] = (
    SetInfo(
        key="ovmerdplus",
        title="OV-MERD+",
        kind="open",
        folders=("ovmerdplus-process",),
        label_file="ovlabel.csv",
        count=532,
        subtitles=(("subtitle_eng.csv",), "sentence"),
        source="Baidu 1nBTw_ujSTQPAMyIs5Qv8Zw or TeraBox 1O130fc81FVsGGsrjLuHyDA (AffectGPT's readme)",
        terms="none stated beside the link; the earlier OV-MERD is part of MER2025: CC BY-NC 4.0, academic use only",
    ),
    SetInfo(
        key="mer2023",
        title="MER2023 MER-MULTI",
        kind="emotion",
        folders=("mer2023-dataset-process",),
        label_file="label-6way.npz",
        array="test1_corpus",
        count=411,
        classes=MER_WORDS,
        source=f"Hugging Face MERChallenge/MER2023, or {PROCESSED}",
        terms=_EULA,
    ),
    SetInfo(
        key="mer2024",
        title="MER2024 MER-SEMI",
        kind="emotion",
        folders=("mer2024-dataset-process",),
        label_file="label-6way.npz",
        array="test1_corpus",
        count=1169,
        classes=MER_WORDS,
        subtitles=(("transcription_merge.csv", "transcription-merge.csv"), "chinese"),
        source=f"the organisers of MER2024 (Hugging Face MERChallenge/MER2024), or {PROCESSED}",
        terms=_EULA,
    ),
    SetInfo(
        key="iemocapfour",
        title="IEMOCAP (four classes)",
        kind="emotion",
        folders=("iemocap-process", "iemocap-dataset"),
        label_file="label_4way.npz",
        array="whole_corpus",
        count=1241,
        classes=IEMOCAP_WORDS,
        session="5",
        integers=True,
        videos=("subvideo-tgt", "subvideo"),
        uncropped=("subvideo",),
        endings=("avi", "mp4"),
        source=f"USC SAIL, sail.usc.edu/iemocap, by release form; or {PROCESSED}",
        terms="the release form's",
    ),
    SetInfo(
        key="meld",
        title="MELD",
        kind="emotion",
        folders=("meld-process", "meld-dataset"),
        label_file="label.npz",
        array="test_corpus",
        count=2610,
        classes=MELD_WORDS,
        integers=True,
        videos=("subvideo",),
        source=f"Hugging Face declare-lab/MELD, or {PROCESSED}",
        terms="GPL-3.0 as stated on its card",
    ),
    SetInfo(
        key="cmumosi",
        title="CMU-MOSI",
        kind="sentiment",
        folders=("cmumosi-process", "cmumosi-dataset"),
        label_file="label.npz",
        array="test_corpus",
        count=686,
        bound=3.0,
        videos=("subvideo",),
        source=f"the CMU MultimodalSDK, or {PROCESSED}",
        terms="CMU's own; ask there",
    ),
    SetInfo(
        key="cmumosei",
        title="CMU-MOSEI",
        kind="sentiment",
        folders=("cmumosei-process", "cmumosei-dataset"),
        label_file="label.npz",
        array="test_corpus",
        count=4659,
        bound=3.0,
        videos=("subvideo_new", "subvideo"),
        source=f"the CMU MultimodalSDK, or {PROCESSED}",
        terms="CMU's own; ask there",
    ),
    SetInfo(
        key="sims",
        title="CH-SIMS",
        kind="sentiment",
        folders=("sims-process", "sims-dataset"),
        label_file="label.npz",
        array="test_corpus",
        count=457,
        bound=1.0,
        source=f"THUIAR, github.com/thuiar/MMSA, or {PROCESSED}",
        terms="THUIAR's own; ask there",
    ),
    SetInfo(
        key="simsv2",
        title="CH-SIMS v2",
        kind="sentiment",
        folders=("simsv2-process", "simsv2-dataset"),
        label_file="label.npz",
        array="test_corpus",
        count=1034,
        bound=1.0,
        videos=("video_new", "video"),
        source=f"THUIAR, github.com/thuiar/MMSA, or {PROCESSED}",
        terms="THUIAR's own; ask there",
    ),
)


def find_set(name: str) -> SetInfo:
    """A set by its key or title, in any case ("MER2023", "iemocapfour", "CMU-MOSI", "mosi").

    Raises: ValueError listing the nine keys and near ones."""
    known: dict[str, SetInfo] = {}
    for info in SETS:
        title = info.title.split(" (")[0]
        for spelling in (info.key, title, title.split()[0] if title.startswith("MER") else title, info.key[3:]):
            known.setdefault(_plain(spelling), info)
    known["iemocap"] = _by_key("iemocapfour")
    found = known.get(_plain(name))
    if found is None:
        near = get_close_matches(_plain(name), known)
        told = f"; near: {', '.join(dict.fromkeys(known[n].key for n in near))}" if near else ""
        raise ValueError(f"No set {name!r}; MER-UniBench has {', '.join(info.key for info in SETS)}{told}.")
    return found


def _by_key(key: str) -> SetInfo:
    """A set by its exact key."""
    return next(info for info in SETS if info.key == key)


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum() or char == "+").replace("+", "plus")
