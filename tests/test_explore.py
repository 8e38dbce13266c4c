"""The explorer cannot be broken by clicking: callbacks, random actions, hostile names, memory."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cmmd import explore
from cmmd.core import ClipSpec, data_path
from cmmd.explore import (
    BUTTONS,
    DIRECTION_WORDS,
    SOLVERS,
    Answer,
    Explorer,
    MadeClip,
    Request,
    Step,
    TrueClip,
    answer_html,
    export_answers,
    find_clip,
    run_request,
)

SPEC = ClipSpec.toy()
EVIL = '<img src=x onerror="alert(1)">&lt;\n\x1b[31m../../etc/passwd'
N_STEPS, PAUSE = 4, 0.001


def true_clip(label: str = "a clip") -> TrueClip:
    video = torch.zeros(18, 64, 64, 3, dtype=torch.uint8)
    return TrueClip(label, video, torch.zeros(SPEC.n_samples), np.array([0.5, 1.0]))


def made_clip(model: str = "a model") -> MadeClip:
    mel, wave = torch.full((80, 112), -5.0), torch.zeros(SPEC.n_samples)
    return MadeClip(model, true_clip().video, mel, wave, np.array([0.52]), 0.1)


class Fake:
    "Replaces what takes long: a sampler of a few steps, pages without pictures. It counts."

    def __init__(self):
        self.lock, self.running, self.most, self.after_cancel = threading.Lock(), 0, 0, []
        self.explorer = None

    def run_request(self, request, *, device, on_step):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        late = 0
        try:
            for k in range(N_STEPS):
                time.sleep(PAUSE)
                late += self.explorer.jobs.state == "cancelling"
                on_step(Step("fake", k + 1, N_STEPS, None, SPEC, "V2A", tuple))
            if request.seed % 7 == 3:
                raise RuntimeError(f"seed {request.seed} fails: {EVIL}")
            return Answer(request, SPEC, true_clip(EVIL), (made_clip(EVIL),))
        finally:
            with self.lock:
                self.running -= 1
            self.after_cancel.append(late)

    def request_html(self, request, spec):
        time.sleep(PAUSE)
        if request.source == "file" and request.file is None:
            raise ValueError(f"no file {EVIL}")
        return "<p>a clip</p>"

    def install(self, monkeypatch, **settings) -> Explorer:
        monkeypatch.setattr(explore, "run_request", self.run_request)
        monkeypatch.setattr(explore, "request_html", self.request_html)
        monkeypatch.setattr(explore, "answer_html", lambda answer: "<p>an answer</p>")
        monkeypatch.setattr(explore.LiveFigure, "update", lambda live, step: (b"", np.zeros(0)))
        monkeypatch.setattr(explore.HearPanel, "_curve", lambda panel, request: 1 / 0)
        monkeypatch.setattr(explore, "export_answers", lambda answers, to, on_part: Path(to))
        monkeypatch.setattr(explore, "checkpoint_gaps", lambda run, device, on_part: on_part())
        monkeypatch.setattr(explore, "run_figure", lambda run: None)
        monkeypatch.setattr(explore, "gap_figure", lambda gaps: None)
        monkeypatch.setattr(explore, "image_tag", lambda figure, alt: "")
        self.explorer = Explorer(device="cpu", **settings)
        assert self.explorer.wait(20)
        return self.explorer


KNOBS = {
    "seed": lambda draw: int(draw.integers(0, 50)),
    "clip_seed": lambda draw: int(draw.integers(0, 50)),
    "num_sample_steps": lambda draw: int(draw.integers(-5, 500)),
    "n_frames": lambda draw: int(draw.integers(-5, 99)),
    "source": lambda draw: str(draw.choice(explore.SOURCES)),
    "direction": lambda draw: str(draw.choice(list(DIRECTION_WORDS))),
    "solver": lambda draw: str(draw.choice(list(SOLVERS))),
    "view": lambda draw: str(draw.choice(list(explore.VIEWS))),
    "shift": lambda draw: int(draw.integers(-9, 9)),
    "path": lambda draw: str(draw.choice(["", "/no/such/file", EVIL])),
    "folder": lambda draw: str(draw.choice(["", "/no/such/folder", EVIL])),
    "export_folder": lambda draw: str(draw.choice(["", "out"])),
    "file": lambda draw: (EVIL, bytes(draw.bytes(20))),
}


def act(explorer: Explorer, draw) -> None:
    "One random action: a knob turned, or a button pressed, as far as a user could press it."
    if draw.random() < 0.35:
        name = str(draw.choice(list(KNOBS)))
        explorer.ask(name, KNOBS[name](draw))
    else:
        explorer.press(str(draw.choice(list(BUTTONS))))
    if draw.random() < 0.3:
        time.sleep(PAUSE * draw.random() * 4)


def check_texts(explorer: Explorer) -> None:
    "Lines are one line, escaped, printable."
    for name in ("status", "error"):
        text = explorer.outputs[name].value
        assert "<img" not in text and "\n" not in text and "\x1b" not in text, text


def click_at_random(explorer: Explorer, fake: Fake, seed: int, n_actions: int = 30) -> None:
    draw = np.random.default_rng([16, seed])
    for _ in range(n_actions):
        act(explorer, draw)
        assert explorer.jobs.state in ("idle", "running", "cancelling")
        check_texts(explorer)
    explorer.jobs.cancel()
    assert explorer.wait(20), "it did not come back to idle"
    assert explorer.jobs.state == "idle" and fake.running == 0
    assert explorer.buttons["cancel"].disabled and not explorer.buttons["generate"].disabled


def click_sequences(monkeypatch, seeds) -> None:
    fake = Fake()
    explorer = fake.install(monkeypatch)
    for seed in seeds:
        click_at_random(explorer, fake, seed)
    assert fake.most == 1, "two jobs at once"
    assert max(fake.after_cancel) <= 1, "more than one step after cancel"
    assert len(fake.after_cancel) > len(seeds), "hardly anything was generated"


def test_random_clicking_breaks_nothing(monkeypatch):
    click_sequences(monkeypatch, range(15))


@pytest.mark.slow
def test_random_clicking_breaks_nothing_200_times(monkeypatch):
    click_sequences(monkeypatch, range(200))


def test_errors_land_in_the_panel_as_one_escaped_line(monkeypatch):
    fake = Fake()
    explorer = fake.install(monkeypatch)
    explorer.ask("seed", 3)
    explorer.press("generate")
    assert explorer.wait(20)
    line = explorer.outputs["error"].value
    assert "RuntimeError: seed 3 fails" in line and "&lt;img" in line
    check_texts(explorer)
    explorer.ask("seed", 4)
    explorer.press("generate")
    assert explorer.wait(20) and explorer.outputs["error"].value == ""


def test_a_strict_panel_raises(monkeypatch):
    explorer = Fake().install(monkeypatch, strict=True)
    with pytest.raises(ValueError, match="nothing to keep"):
        explorer.press("keep")
    explorer.ask("seed", 3)
    explorer.press("generate")
    with pytest.raises(RuntimeError, match="seed 3 fails"):
        explorer.wait(20)


def test_buttons_follow_the_state(monkeypatch):
    fake = Fake()
    explorer = fake.install(monkeypatch)
    states = []
    explorer.jobs.on_state = lambda state: (
        explorer.paint(state),
        states.append((state, {n for n, b in explorer.buttons.items() if not b.disabled})),
    )
    explorer.press("generate")
    assert explorer.wait(20)
    everything = set(BUTTONS)
    assert states == [("running", {"cancel"}), ("idle", everything - {"cancel"})]


def test_each_button_has_its_method():
    assert all(callable(getattr(Explorer, name)) for name in BUTTONS)


@pytest.mark.parametrize("direction", DIRECTION_WORDS)
def test_each_direction_and_solver_with_the_real_model(direction):
    for solver in SOLVERS if direction == "V2A" else ["DDIM"]:
        seen = []
        request = Request(direction=direction, solver=solver, num_sample_steps=3, n_frames=12)
        answer = run_request(request, on_step=seen.append)
        made = answer.made[0]
        assert [s.number for s in seen] == [1, 2, 3] and len(made.video) == 12
        assert len(made.waveform) == SPEC.with_frames(12).n_samples
        video, mel = seen[-1].estimate()
        assert video.shape == made.video.shape and mel.shape == made.mel.shape
    assert answer_html(answer).count("<video controls") == (1 if direction == "joint" else 2)


def test_models_differ_only_by_their_weights():
    request = Request(models=("toy-bounce", "toy-cmmd"), num_sample_steps=3)
    both = run_request(request)
    alone = run_request(Request(models=("toy-cmmd",), num_sample_steps=3))
    assert torch.equal(both.made[1].mel, alone.made[0].mel)


def test_a_dropped_file_is_decoded_by_the_limited_child_alone(monkeypatch):
    content = data_path("toy", "bounce-1.mp4").read_bytes()
    clip = find_clip(Request(source="file", file=(EVIL, content)), SPEC)
    assert len(clip.video) == 18 and "\n" not in clip.label and not clip.exact
    with pytest.raises(ValueError, match="MiB"):
        find_clip(Request(source="file", file=("big.mp4", bytes(explore.MAX_BYTES + 1))), SPEC)

    def refuse(path, *, spec):
        raise explore.MediaError(f"{path}: refused")

    monkeypatch.setattr(explore, "read_clip", refuse)
    with pytest.raises(ValueError) as caught:
        find_clip(Request(source="file", file=(EVIL, content)), SPEC)
    assert str(caught.value).endswith(": refused") and "cmmd-" not in str(caught.value)


def test_a_file_without_the_needed_stream_is_one_line(tmp_path):
    from cmmd.media import write_wav

    sound = write_wav(tmp_path / "s.wav", torch.zeros(SPEC.n_samples), spec=SPEC)
    with pytest.raises(ValueError, match="s.wav: holds no video"):
        run_request(Request(source="file", file=sound, num_sample_steps=1))
    answer = run_request(Request(direction="A2V", source="file", file=sound, num_sample_steps=2))
    assert answer.truth.video is None and "<video" in answer_html(answer)


def test_hostile_names_stay_text(tmp_path):
    answer = Answer(Request(), SPEC, true_clip(EVIL), (made_clip(EVIL),))
    page = export_answers([answer], tmp_path / "out").read_text()
    assert "onerror=&quot;" in page and "<img src=x" not in page
    assert page.count("<video controls") == 2 and "<script" not in page and "<link" not in page


def test_cancel_comes_within_one_step_with_the_real_model():
    explorer = Explorer(device="cpu")
    assert explorer.wait(60)
    explorer.ask("num_sample_steps", 200)
    numbers, real = [], explorer._watch
    explorer._watch = lambda *given: (numbers.append(given[-1].number), real(*given))
    explorer.press("generate")
    while len(numbers) < 3:
        time.sleep(0.02)
    explorer.press("cancel")
    asked = len(numbers)
    assert explorer.wait(20) and len(numbers) <= asked + 1
    assert "Cancelled" in explorer.outputs["status"].value and explorer.jobs.error is None


def test_a_panel_can_be_made_while_nobody_watches_and_all_views_can_be_opened():
    explorer = Explorer(strict=True, device="cpu")
    for view in explore.VIEWS:
        explorer.ask("view", view)
        assert explorer.wait(60)
        shown = [n for n, box in explorer.views.items() if box.layout.display != "none"]
        assert shown == [view]
    assert "<img" in explorer.outputs["hear"].value
