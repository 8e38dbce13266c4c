"""README and its siblings say what is there: reading order, commands, links."""

import re

import pytest
from project import LESSONS, ROOT, SETTINGS, SOLUTIONS, Notebook, name

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| \[(\d\d)\]\((nbs/[\w.]+)\) \| ([^|]+?) \| ([^|]+?) \| (\d+) \|$", re.M)
rows = {path: (number, title) for number, path, title, _, _ in ROW.findall(README)}
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "data").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)
LINK = re.compile(r"(?<!\\)\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")


def links(text: str) -> list[str]:
    "Targets of links and pictures, without those in code."
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return [a or b for a, b in LINK.findall(text)]


def broken(text: str, folder) -> list[str]:
    "Relative links whose file is not there; web addresses are not looked up."
    relative = [x for x in links(text) if not re.match(r"[a-z]+:|#", x)]
    return [x for x in relative if not (folder / x.split("#")[0]).exists()]


def test_table_lists_exactly_the_notebooks():
    assert list(rows) == [f"nbs/{p.name}" for p in LESSONS]


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_titles_match(path):
    number, title = rows[f"nbs/{path.name}"]
    assert number == path.name[:2] and title == Notebook(path).title


def test_the_two_commands_exist():
    assert "make demo" in README and "make test" in README
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        asked = set(
            re.findall(
                r"\bmake ([a-z-]+)",
                "\n".join(re.findall(r"`[^`]+`|```.*?```", page.read_text(), re.S)),
            )
        )
        assert asked <= targets, f"{page.name} names {asked - targets}, which the Makefile has not"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_pages(path):
    assert broken(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=name)
def test_links_of_notebooks(path):
    assert broken("\n".join(c.source for c in Notebook(path).markdown), path.parent) == []


def test_readme_fits_one_screen():
    lines = [line for line in README.splitlines() if not ROW.match(line)]  # the table may grow
    assert len(lines) <= 60 and len("\n".join(lines)) <= 5_000


def test_version_is_in_the_changelog():
    assert f"## {SETTINGS['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_are_exact_and_cover_the_requirements():
    lines = [
        x
        for x in (ROOT / "constraints.txt").read_text().splitlines()
        if x and not x.startswith("#")
    ]
    assert [x for x in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.!+]*", x)] == []
    plain = lambda x: re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[]", x)[0]).lower()
    wanted = (SETTINGS["requirements"] + " " + SETTINGS["dev_requirements"]).split()
    assert {plain(x) for x in wanted} - {plain(x) for x in lines} == set()


def test_actions_are_pinned_by_commit():
    for path in (ROOT / ".github").rglob("*.yml"):
        used = re.findall(r"uses:\s*(\S+)", path.read_text(encoding="utf-8"))
        assert [u for u in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", u)] == []
