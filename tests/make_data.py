"""Write data/toy: clips of the toy world as mp4, and their events (`python tests/make_data.py`)."""

import json

from project import ROOT

from cmmd.core import ClipSpec
from cmmd.toy import make_clips
from cmmd.viz import encode_mp4

FOLDER, SEED, N = ROOT / "data" / "toy", 2024, 3


def files() -> dict[str, bytes]:
    "Name and content of each file."
    spec, found, events = ClipSpec.toy(), {}, {}
    for kind in ("bounce", "dance"):
        clips = make_clips(N, spec=spec, seed=SEED, kind=kind)
        for i in range(N):
            found[f"{kind}-{i}.mp4"] = encode_mp4(
                clips.video[i], clips.waveform[i], spec=spec, scale=4
            )
            events[f"{kind}-{i}.mp4"] = [round(float(t), 6) for t in clips.events[i]]
    told = {"seed": SEED, "unit": "s", "spec": spec.to_dict(), "events": events}
    return {**found, "events.json": (json.dumps(told, indent=1) + "\n").encode()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, content in files().items():
        (FOLDER / file).write_bytes(content)
