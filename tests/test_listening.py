"""The listening test: kills, faults, hostile files, random clicks, and its page in a browser."""

import csv
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmmd import listening as L
from cmmd.core import ClipSpec, make_generator
from cmmd.toy import make_clips

SPEC = ClipSpec.toy()
SECRET = b"for the tests only, 32 bytes....."
SYSTEMS = ("very good model", "other model")


@pytest.fixture(scope="module")
def study() -> L.Study:
    "Two conditions, two systems, one of them with two tries: 2 x (4 + 1 + 2) items."
    clips = make_clips(3, seed=7)
    reference = {f"kitchen {i}": (clips.video[i], clips.waveform[i]) for i in range(3)}
    systems = {
        SYSTEMS[0]: reference,
        SYSTEMS[1]: {name: [clip, (clip[0], clip[1] * 0.5)] for name, clip in reference.items()},
    }
    return L.make_study(
        "Balls", reference, systems, training="kitchen 2", spec=SPEC, secret=SECRET, seed=3
    )


def answer(study, *, rater="ann", item=0, question="sound", score=3, at="2026-01-31T12:00:00Z"):
    return L.RaterAnswer(study.id, rater, study.items[item].id, question, score, at)


# ---- blind
def test_page_and_saved_study_tell_nothing(study, tmp_path):
    L.write_page(study, tmp_path / "page.html")
    L.save_study(study, tmp_path / "study.json")
    for path in tmp_path.iterdir():
        text = re.sub(r'"media": "[A-Za-z0-9+/=]*"', "", path.read_text())
        for word in (*SYSTEMS, "kitchen", "+100", "+400", "reference", SECRET.decode()):
            assert word not in text, f"{path.name} says {word!r}"
        listed = re.findall(r'"id": "([0-9a-f]{16})"', text)[: len(study.items)]
        assert len(listed) == len(study.items)
        assert listed == sorted(listed), "an order that could tell"
    for item in study.items:
        for word in (b"model", b"kitchen", b"reference", b".mp4", b"Lavf"):
            assert word not in item.media
    blind = L.load_study(tmp_path / "study.json")
    assert blind.id == study.id and {x.system + x.condition for x in blind.items} == {""}


def test_page_is_the_same_whether_the_study_is_blind_or_not(study, tmp_path):
    blind = L.load_study(L.save_study(study, tmp_path / "study.json"))
    assert L.page_html(blind) == L.page_html(study)


def test_a_hostile_title_stays_text(study):
    title = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    bad = L.Study(title, study.items[:1], study.question_set, 0)
    page = L.page_html(bad)
    assert page.count("<script") == 2 and "<img" not in page


def test_secret_is_drawn_anew(study):
    clips = {"a": (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.zeros(3200))}
    clips["b"] = clips["a"]
    made = [L.make_study("x", clips, {"m": clips}, training="b", spec=SPEC) for _ in range(2)]
    assert not {x.id for x in made[0].items} & {x.id for x in made[1].items}


def test_key_is_never_replaced(study, tmp_path):
    path = L.write_key(L.Key.of(study), tmp_path / "key.json")
    before = path.read_bytes()
    L.write_key(L.Key.of(study), path)
    other = L.Key("00000000", study.question_set, 0, {})
    with pytest.raises(ValueError, match="another study"):
        L.write_key(other, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": 3}', "\0", "{" * 5000])
def test_bad_key_and_bad_study_are_one_line(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    for read in (L.read_key, L.load_study):
        with pytest.raises(ValueError, match="bad.json") as info:
            read(path)
        assert "\n" not in str(info.value)


def test_a_page_too_large_says_so(study, tmp_path):
    with pytest.raises(ValueError, match=r"14 clips make a page of \d\.\d MB.*max_mb=0.1"):
        L.write_page(study, tmp_path / "p.html", max_mb=0.1)
    assert not list(tmp_path.iterdir())


# ---- answers on disk
def test_killed_between_answers_nothing_is_lost(study, tmp_path):
    "kill -9 at a random moment: every answer that was acknowledged is there, and none is invented."
    L.save_study(study, tmp_path / "study.json")
    program = textwrap.dedent("""
        import sys
        from cmmd import listening as L
        sitting = L.Sitting(L.load_study(sys.argv[1]), sys.argv[2])
        sitting.begin("ann", True)
        print("ready", flush=True)
        while sitting.page == "item":
            for q in sitting.study.questions:
                sitting.score(q.key, 4)
                print(sitting.item, q.key, flush=True)
            sitting.go(1)
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "study.json"), str(tmp_path / "out")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "ready\n"
        said = [job.stdout.readline() for _ in range(random.Random(0).randint(3, 20))]
    finally:
        job.kill()
        said += job.stdout.readlines()
        job.wait()
    found = L.read_answers(tmp_path / "out", L.Key.of(study))
    got = {(a.item, a.question) for a in found.answers}
    acknowledged = {tuple(line.split()) for line in said if line.endswith("\n")}
    assert acknowledged <= got and len(got) <= len(acknowledged) + 1
    again = L.Sitting(study, tmp_path / "out")
    again.begin("ann", True)
    assert set(again.scores) == got


@pytest.mark.parametrize("cut", range(1, 57, 9))
def test_a_torn_row_costs_that_row_alone(study, tmp_path, cut):
    path = L.append_answers(tmp_path / "a.csv", [answer(study), answer(study, question="fit")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    L.append_answers(path, [answer(study, question="timing", score=5)])
    found = L.read_answers(tmp_path, L.Key.of(study))
    questions = {a.question for a in found.answers}
    assert {"sound", "timing"} <= questions and len(found.refused) == (cut > 1)


def test_a_disk_that_fails_is_said_and_the_score_not_taken(study, tmp_path, monkeypatch):
    sitting = L.Sitting(study, tmp_path)
    sitting.begin("ann", True)
    monkeypatch.setattr(L.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        sitting.score("sound", 3)
    assert sitting.scores == {}


def test_a_damaged_file_is_not_taken_for_an_empty_one(study, tmp_path):
    path = L.answers_path(tmp_path, study.id, "ann")
    L.append_answers(path, [answer(study)])
    path.write_bytes(path.read_bytes().replace(b"study", b"stud\xff"))
    before, sitting = path.read_bytes(), L.Sitting(study, tmp_path)
    with pytest.raises(ValueError, match="ann.csv' is not UTF-8 text"):
        sitting.begin("ann", True)
    assert sitting.page == "start" and path.read_bytes() == before


def test_people_and_simulated_raters_never_share_a_file(study, tmp_path):
    path = tmp_path / "a.csv"
    L.append_answers(path, [answer(study)])
    simulated = L.RaterAnswer(study.id, "ann", study.items[0].id, "fit", 3, L.utc_now(), True)
    with pytest.raises(ValueError, match="another header"):
        L.append_answers(path, [simulated])
    with pytest.raises(ValueError, match="mixture"):
        L.append_answers(tmp_path / "b.csv", [answer(study), simulated])
    L.append_answers(tmp_path / "c.csv", [simulated])
    assert "SIMULATED" in (tmp_path / "c.csv").read_text().splitlines()[0]


# ---- files from strangers
HEAD = ",".join(L.COLUMNS_OF_ANSWERS)


def test_the_later_answer_counts_whatever_the_order_of_rows_and_files(study, tmp_path):
    times = ["2026-01-31T12:00:00Z", "2026-01-31T12:00:01.5Z", "2026-01-31T12:00:09Z"]
    for order in itertools.permutations(range(3)):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        for place, i in enumerate(order):
            L.append_answers(
                tmp_path / "x" / f"{place // 2}.csv", [answer(study, score=1 + i, at=times[i])]
            )
        found = L.read_answers(tmp_path / "x", L.Key.of(study))
        assert [a.score for a in found.answers] == [3] and len(found.replaced) == 2


BAD_ROWS = {
    "score must be 1 to 5": [
        dict(score=s) for s in ("0", "6", "3.0", "", "five", "1e0", "-1", "٣")
    ],
    "rater": [
        dict(rater=s) for s in ("=1+1", "+x", "-x", "@x", "../x", "Ann", "", "a b", "a" * 33)
    ],
    "item": [dict(item=s) for s in ("", "0" * 16, "A" * 16, "../../etc/passwd")],
    "question": [dict(question=s) for s in ("music", "", "sound ", "__class__")],
    "answered_at": [dict(at=s) for s in ("", "now", "2026-13-01T00:00:00Z", "2026-01-01 00:00:00")],
    "study": [dict(study=s) for s in ("", "deadbeef", "x" * 10000)],
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_each_bad_row_is_one_line_and_the_rest_is_read(study, tmp_path, reason):
    good = dict(
        study=study.id,
        rater="bob",
        item=study.items[0].id,
        question="sound",
        score="4",
        at="2026-01-31T12:00:00Z",
    )
    rows = [list((good | change).values()) for change in BAD_ROWS[reason]]
    with open(tmp_path / "bob.csv", "w", newline="") as f:
        csv.writer(f).writerows([L.COLUMNS_OF_ANSWERS, *rows, list(good.values())])
    found = L.read_answers(tmp_path, L.Key.of(study))
    assert [a.score for a in found.answers] == [4]
    assert len(found.refused) == len(rows)
    for i, line in enumerate(found.refused, 2):
        assert line.startswith(f"bob.csv, row {i}: {reason}") and "\n" not in line
        assert len(line) < 160


def test_bad_files_are_one_line_each(study, tmp_path):
    (tmp_path / "a-good.csv").write_text(HEAD + "\n")
    bad = {
        "empty.csv": b"",
        "huge.csv": b"a" * (L.MAX_ANSWER_BYTES + 1),
        "binary.csv": bytes(range(256)),
        "zero.csv": HEAD.encode() + b"\n\0\0",
        "utf16.csv": HEAD.encode("utf-16"),
        "quote.csv": HEAD.encode() + b'\n"never closed',
        "columns.csv": b"a,b,c\n1,2,3\n",
        "order.csv": ",".join(reversed(L.COLUMNS_OF_ANSWERS)).encode(),
        "new\nline.csv": b"x",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere")
    found = L.read_answers(tmp_path, L.Key.of(study))
    assert found.answers == () and len(found.refused) == len(bad) + 2
    assert all("\n" not in line for line in found.refused)


def test_excel_files_with_a_mark_and_crlf_are_read(study, tmp_path):
    path = L.append_answers(tmp_path / "a.csv", [answer(study)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(L.read_answers(tmp_path, L.Key.of(study)).answers) == 1


def test_a_device_or_pipe_is_never_opened(study, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    start = time.time()
    assert "is no file" in L.read_answers(tmp_path).refused[0] and time.time() - start < 2


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_stop_the_reading(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "x.csv").write_bytes(HEAD.encode() + b"\n" + data)
    found = L.read_answers(folder)
    assert found.answers == () and all("\n" not in line for line in found.refused)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_a_rater_is_safe_in_paths_and_spreadsheets_or_refused(name):
    try:
        safe = L.check_rater(name)
    except ValueError:
        return
    assert re.fullmatch("[a-z0-9][a-z0-9_-]*", safe)
    assert L.answers_path("f", "00000000", name).parent.name == "f"


# ---- the widget
def n_widgets() -> int:
    from ipywidgets.widgets import widget

    return len(widget._instances)


def test_clicking_cannot_break_it(study, tmp_path):
    "30 sequences of 30 random actions: errors go to the panel, and disk and buttons agree."
    key = L.Key.of(study)
    for seed in range(30):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        test = L.ListeningTest(study, f"r{seed}", folder)
        made = n_widgets()
        for _ in range(30):
            act = draw.choice(["Begin", "Next", "Next", "Back", "Stop", "tick", "score", "score"])
            if act == "tick":
                test.start.agreed.value = not test.start.agreed.value
            elif act == "score":
                row = draw.choice(list(test.form.rows.values()))
                row.value = draw.choice([1, 2, 3, 4, 5])
            elif act != "Stop" or draw.random() < 0.1:
                test.buttons[act].click()
        assert test.page in ("start", "item", "end")
        if test.page == "start":
            assert not folder.exists()
            continue
        saved = L.read_answers(folder, key) if folder.exists() else L.AnswersRead((), (), ())
        assert {(a.item, a.question): a.score for a in saved.answers} == test.scores
        assert not saved.refused
        for q, row in test.form.rows.items():
            if test.page == "item":
                assert row.value == test.scores.get((test.item, q))
        assert n_widgets() == made, "a page leaves widgets behind"


# ---- the statistics
def test_signed_rank_is_scipys():
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(1)
    for _ in range(50):
        d = rng.integers(-3, 4, rng.integers(6, 60)) + rng.choice([0, 0.5])
        want = wilcoxon(d, method="asymptotic", correction=False).pvalue if d.any() else 1.0
        assert np.isclose(L.signed_ranks(d)[0], want)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_alpha_ignores_order_names_and_for_intervals_scale(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, 6, (5, 12)).astype(float)
    scores[rng.random(scores.shape) < 0.2] = np.nan
    for distance in (L.nominal_distance, L.ordinal_distance, L.interval_distance):
        a = L.krippendorff_alpha(scores, distance)
        shuffled = scores[rng.permutation(5)][:, rng.permutation(12)]
        assert np.isclose(L.krippendorff_alpha(shuffled, distance), a) and a <= 1
    a = L.krippendorff_alpha(scores, L.interval_distance)
    assert np.isclose(L.krippendorff_alpha(3 * scores - 7, L.interval_distance), a)
    ranks = L.krippendorff_alpha(np.exp(scores), L.ordinal_distance)
    assert np.isclose(ranks, L.krippendorff_alpha(scores, L.ordinal_distance))


def test_simulated_raters_recover_what_was_put_in(study):
    key = L.Key.of(study)
    exact = [L.SimulatedRater(f"r{i}", noise=0.0, lapse=0.0) for i in range(6)]
    systems = {s: L.SimulatedSystem(q, 0, 0) for s, q in zip(SYSTEMS, (4.0, 2.0))}
    ratings = L.unblind(L.simulate_answers(key, systems, exact, generator=make_generator(0)), key)
    d = L.pair_differences(ratings, *SYSTEMS, "sound")
    assert d.shape == (6, 2) and (d == 2).all()
    assert not any(s.flags for s in L.screen_raters(ratings))
    assert all(r.simulated for r in ratings)
    assert "SIMULATED" in L.rating_plot(ratings, "x").texts[0].get_text()


# ---- the page in a browser
def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium()
    if path is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def listen(page) -> None:
    "Play the clip to its end by keyboard; the questions unlock."
    assert page.locator("#q-sound:disabled").count() == 1
    page.keyboard.press("p")
    page.wait_for_selector("#q-sound:enabled", timeout=10_000)


def test_the_page_in_a_browser(study, tmp_path, browser):
    "Answer some, reload, go on, go back and change one, finish, save: the CSV is right."
    small = L.Study("Balls", study.items[:4], study.question_set, 3, study.training)
    L.write_page(small, tmp_path / "page.html")
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    page, trouble, asked = context.new_page(), [], []
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: asked.append(r.url))
    page.goto((tmp_path / "page.html").as_uri())
    page.fill("#name", "=cmd")
    page.check("#agree")
    page.click("#begin")
    assert page.locator("#badname").is_visible() and page.locator("#item").is_hidden()
    page.fill("#name", "Ann")
    page.click("#begin")
    given = {}
    order = L.rater_order(3, "ann", [x.id for x in small.items])
    for i, item in enumerate(order):
        assert page.locator("#where").inner_text() == f"Clip {i + 1} of 4"
        listen(page)
        for j, question in enumerate(small.questions):
            given[item, question.key] = 1 + (2 * i + j) % 5
            page.keyboard.press(str(given[item, question.key]))
            if (i, j) == (1, 0):  # in the middle of the second clip
                page.reload()
                assert page.locator("#where").inner_text() == "Clip 2 of 4"
                chosen = page.locator("#q-sound input:checked")
                assert chosen.input_value() == str(given[item, "sound"])
        assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [1280, 1280]
        if i == 2:
            page.click("#back")
            page.locator("#q-fit label").nth(4).click()  # a change of mind, by mouse
            given[order[1], "fit"] = 5
            page.keyboard.press("Enter")
        page.keyboard.press("Enter")
    assert "All 4 clips" in page.locator("#verdict").inner_text()
    with page.expect_download() as download:
        page.click("#save")
    folder = tmp_path / "mail"
    folder.mkdir()
    download.value.save_as(folder / download.value.suggested_filename)
    assert download.value.suggested_filename == f"answers-{small.id}-ann.csv"
    found = L.read_answers(folder, L.Key.of(small))
    assert not found.refused and {(a.item, a.question): a.score for a in found.answers} == given
    assert [a.item for a in found.answers if a.question == "sound"] == order
    assert trouble == [] and {u.split(":")[0] for u in asked} <= {"file", "data", "blob"}
    context.close()


def test_stop_delete_and_another_rater(study, tmp_path, browser):
    L.write_page(study, tmp_path / "page.html")
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.on("dialog", lambda d: d.accept())
    page.goto((tmp_path / "page.html").as_uri())
    page.fill("#name", "bob")
    page.check("#agree")
    page.keyboard.press("Enter")
    listen(page)
    page.keyboard.press("2")
    page.click("#stop")
    assert "after 0 of 14" in page.locator("#verdict").inner_text()
    page.click("#other")
    page.wait_for_selector("#name")
    stored = page.evaluate("Object.entries(localStorage)")
    assert [json.loads(v)[0]["score"] for k, v in stored if k.endswith("answers/bob")] == [2]
    page.fill("#name", "bob")
    page.check("#agree")
    page.click("#begin")
    page.click("#stop")
    page.click("#forget")
    page.wait_for_selector("#name")
    assert page.evaluate("localStorage.length") == 0
    context.close()


def test_storage_that_was_tampered_with_is_not_believed(study, tmp_path, browser):
    L.write_page(study, tmp_path / "page.html")
    context = browser.new_context()
    page, trouble = context.new_page(), []
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.goto((tmp_path / "page.html").as_uri())
    item = study.items[0].id
    lies = [
        {"item": item, "question": "sound", "score": 9, "at": "2026-01-31T12:00:00Z"},
        {"item": "<img src=x>", "question": "sound", "score": 3, "at": "2026-01-31T12:00:00Z"},
        {"item": item, "question": "fit", "score": 3, "at": "=1+1"},
        None,
        7,
    ]
    place = f"cmmd-listening/{study.id}"
    page.evaluate(
        "([place, lies]) => { localStorage.setItem(place + '/answers/eve', JSON.stringify(lies));"
        "localStorage.setItem(place + '/last', 'eve'); }",
        [place, lies],
    )
    page.reload()
    assert page.locator("#where").inner_text() == "Clip 1 of 14"
    page.click("#stop")
    assert "after 0 of 14" in page.locator("#verdict").inner_text() and trouble == []
    context.close()
