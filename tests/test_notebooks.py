"""Hygiene of every notebook: short cells, light files, prose before code, outputs for all."""

import ast
import re

import pytest
from project import LABS, LESSONS, ROOT, SOLUTIONS, TEST_FLAGS, Notebook, name, text_outputs

MAX_CELL_LINES, MAX_BYTES, MAX_PLAYERS = 40, 400_000, 2
KNOWN_DIRECTIVES = {
    "default_exp",
    "export",
    "exports",
    "exporti",
    "hide",
    "eval",
    "echo",
    "output",
    "code-fold",
}
HOME = re.compile(r"(?<![\w.:/-])(/(home|root|Users|work|tmp|mnt|opt|var)/|~/|[A-Z]:\\)")
notebooks = {path: Notebook(path) for path in LESSONS + SOLUTIONS}
each = pytest.mark.parametrize("nb", notebooks.values(), ids=map(name, notebooks))
each_lesson = pytest.mark.parametrize("nb", [notebooks[p] for p in LESSONS], ids=map(name, LESSONS))
each_solution = pytest.mark.parametrize(
    "nb", [notebooks[p] for p in SOLUTIONS], ids=map(name, SOLUTIONS)
)


def only_imports(cell) -> bool:
    "Imports stand alone in their cell and need no words; so do directives."
    return cell.runs and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in cell.tree.body)


def is_prose(cell) -> bool:
    "Markdown that says something: more than headings."
    return cell.kind == "markdown" and any(
        x.strip() and not x.startswith("#") for x in cell.source.splitlines()
    )


# ---- the file
@each
def test_name_and_format(nb):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", nb.path.name)
    assert nb.json["nbformat"] == 4 and nb.json["metadata"]["kernelspec"]["name"] == "python3"
    ids = [c.id for c in nb.cells]
    assert all(ids) and len(ids) == len(set(ids)), "cell ids are missing or repeated"


@each
def test_is_light(nb):
    assert nb.path.stat().st_size <= MAX_BYTES


@each
def test_no_widget_state(nb):
    assert "widgets" not in nb.json["metadata"]


# ---- the code
@each
def test_code_cells_are_short(nb):
    assert {c.id: n for c in nb.code if (n := len(c.source.splitlines())) > MAX_CELL_LINES} == {}


@each
def test_code_is_ascii(nb):
    assert [c.id for c in nb.code if not c.source.isascii()] == []


@each
def test_directives_are_known_and_on_top(nb):
    for cell in nb.code:
        unknown = set(cell.directives) - KNOWN_DIRECTIVES - set(TEST_FLAGS)
        assert not unknown, (
            f"cell {cell.id}: {unknown} is no nbdev directive and not in tst_flags, so it would run"
        )
        lines = len(re.findall(r"^\s*#\|", cell.source, re.M))
        assert lines == len(cell.directives), (
            f"cell {cell.id}: a directive below the code is not read"
        )


@each
def test_no_shell_no_install(nb):
    bad = re.compile(r"^\s*(%pip|%conda|%%bash|%%sh|!|%cd|%load_ext autoreload|pip install)", re.M)
    assert [c.id for c in nb.code if bad.search(c.source)] == []


@each
def test_no_star_imports_and_no_unfinished_words(nb):
    words = re.compile(
        r"import \*|\b("
        + "|".join(["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error"])
        + r")\b"
    )
    assert [c.id for c in nb.cells if words.search(c.source)] == []


# ---- the outputs
@each
def test_no_errors_no_warnings_no_progress_bars(nb):
    for cell in nb.code:
        assert not [o for o in cell.outputs if o["output_type"] == "error"], (
            f"cell {cell.id}: an error output"
        )
        assert not [o for o in cell.outputs if o.get("name") == "stderr"], (
            f"cell {cell.id}: stderr output"
        )
        for text in text_outputs(cell):
            assert not re.search(r"\r(?!\n)|\d+%\|[#\u2588 ]|\d(it/s|s/it)\b", text), (
                f"cell {cell.id}: a progress bar"
            )


@each
def test_no_machine_paths(nb):
    for cell in nb.cells:
        for text in [cell.source, *text_outputs(cell)]:
            text = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", text)
            assert not (m := HOME.search(text)), (
                f"cell {cell.id}: {text[max(0, m.start() - 20) : m.end() + 20]!r}"
            )


@each
def test_markdown_holds_no_embedded_files(nb):
    assert [c.id for c in nb.markdown if "base64," in c.source] == []
    assert not [c for c in nb.json["cells"] if c.get("attachments")]


@each
def test_few_players(nb):
    players = sum(
        len(re.findall(r"<(?:audio|video)\b", t)) for c in nb.code for t in text_outputs(c)
    )
    assert players <= MAX_PLAYERS


@each
def test_ran_when_it_should_show(nb):
    "A cell that prints, or ends in an expression other than a call, has its output committed."
    for cell in (c for c in nb.code if c.runs and not c.outputs):
        body = cell.tree.body
        prints = [
            n
            for n in body
            if isinstance(n, ast.Expr)
            and isinstance(n.value, ast.Call)
            and getattr(n.value.func, "id", "") in {"print", "display"}
        ]
        last = body[-1] if body and not cell.source.rstrip().endswith(";") else None
        shows = isinstance(last, ast.Expr) and not isinstance(
            last.value, (ast.Call, ast.Constant, ast.Await)
        )
        assert not prints and not shows, (
            f"cell {cell.id} shows something, but no output is committed"
        )


@each_lesson
def test_outputs_are_committed(nb):
    lessons = [c for c in nb.code if c.runs and not c.exported]
    assert sum(bool(c.outputs) for c in lessons) >= max(3, len(lessons) // 4), (
        "people read it without running it"
    )
    shown = {kind.split("/")[0] for c in nb.code for o in c.outputs for kind in o.get("data", {})}
    drawn = any("![" in c.source or "<img" in c.source for c in nb.markdown)
    assert "image" in shown or drawn, "nothing to see: no picture"


# ---- the lesson
@each
def test_starts_with_its_title(nb):
    assert nb.cells[0].kind == "markdown" and nb.cells[0].source.startswith("# ")
    assert len(re.findall(r"^# \S", "\n".join(c.source for c in nb.markdown), re.M)) == 1, (
        "one title"
    )


@each_lesson
def test_promises_something_at_the_top(nb):
    top = "\n".join(c.source for c in nb.cells[:4] if c.kind == "markdown")
    assert len(re.findall(r"^\s*[-*] ", top, re.M)) >= 3, "three things you will be able to do"
    assert re.search(r"\d\s*(s|sec|seconds|min|minutes)\b", top), "the measured run time"
    assert re.search(r"\b(paper|sec|section|eq|app|table|cmmd)\b", top, re.I), "where in the paper"


@each_lesson
def test_has_the_closing_sections(nb):
    "A lesson ends in exercises; a lab, whose answer may be wrong, in what would refute it."
    for part in ("summary", "change our mind" if nb.path in LABS else "exercise"):
        assert any(part in h.lower() for h in nb.headings), f"no heading with '{part}'"
    ending = "\n".join(c.source for c in nb.markdown[-3:])
    assert re.search(r"\b(next|further)\b", ending, re.I), "what comes next, and further reading"


@each_lesson
def test_prose_comes_before_code(nb):
    cells = [c for c in nb.cells if c.kind == "code" or is_prose(c)]  # headings stand between
    for i, cell in enumerate(cells):
        if cell.kind == "code" and cell.source.strip() and not only_imports(cell):
            assert any(map(is_prose, cells[max(0, i - 2) : i])), (
                f"cell {cell.id}: no prose within two cells above"
            )


@each_lesson
def test_has_solutions(nb):
    "A lab sets no exercises: what it asks, nobody knows the answer to."
    if nb.path in LABS:
        return
    assert ROOT / "nbs" / "solutions" / nb.path.name in SOLUTIONS


@each_lesson
def test_export_cells_do_not_also_run_the_lesson(nb):
    for cell in (c for c in nb.code if c.exported):
        bad = [
            type(n).__name__
            for n in cell.tree.body
            if isinstance(n, (ast.Assert, ast.For, ast.While, ast.With))
        ]
        assert not bad, f"cell {cell.id}: an exported cell with {bad} would run at import"
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in cell.tree.body]
        assert all(imports) or not any(imports), (
            f"cell {cell.id}: imports stand alone in their cell"
        )


@each_solution
def test_solution_belongs_to_a_lesson_and_judges_itself(nb):
    assert ROOT / "nbs" / nb.path.name in LESSONS
    assert not nb.modules and not [c.id for c in nb.code if c.exported], (
        "a solution exports nothing"
    )
    assert any(isinstance(n, ast.Assert) for c in nb.code for n in ast.walk(c.tree)), (
        "no assert judges the answers"
    )
