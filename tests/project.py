"""What the tests know about the tree: its notebooks and modules, found, never listed."""

import ast
import json
import re
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]
TEST_FLAGS = SETTINGS["tst_flags"].split()

LESSONS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith(("_", ".")))
LABS = [p for p in LESSONS if p.name >= "90"]  # they answer an open question from stored runs
SOLUTIONS = sorted((ROOT / "nbs" / "solutions").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "cmmd").glob("*.py") if not p.name.startswith("_"))


@dataclass
class Cell:
    "One cell, its source as text."

    kind: str
    source: str
    id: str
    outputs: list = field(default_factory=list)

    @cached_property
    def directives(self) -> dict[str, str]:
        "The `#| name value` lines, as nbdev reads them: only those above the first line of code."
        found = {}
        for line in self.source.splitlines():
            match = re.match(r"\s*#\|\s*([\w-]+):?\s*(.*?)\s*$", line)
            if match:
                found[match[1]] = match[2]
            elif line.strip() and not line.strip().startswith(("#", "%%")):
                break
        return found

    @property
    def exported(self) -> bool:
        return bool({"export", "exports", "exporti"} & set(self.directives))

    @property
    def runs(self) -> bool:
        "Whether a default run of the tests executes it."
        if self.directives.get("eval", "").lower() == "false":
            return False
        return self.kind == "code" and not set(TEST_FLAGS) & set(self.directives)

    @property
    def tree(self) -> ast.Module:
        "The cell's code without IPython's own lines."
        code = re.sub(r"^\s*[%!].*$", "pass", self.source, flags=re.M)
        try:
            return ast.parse(code)
        except SyntaxError:
            if self.runs:
                raise
            return ast.parse("")  # a stub to fill in may be half a sentence


@dataclass
class Notebook:
    path: Path

    @cached_property
    def json(self) -> dict:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @cached_property
    def cells(self) -> list[Cell]:
        return [
            Cell(c["cell_type"], "".join(c["source"]), c.get("id", ""), c.get("outputs", []))
            for c in self.json["cells"]
        ]

    @property
    def code(self) -> list[Cell]:
        return [c for c in self.cells if c.kind == "code" and c.source.strip()]

    @property
    def markdown(self) -> list[Cell]:
        return [c for c in self.cells if c.kind == "markdown"]

    @property
    def number(self) -> int:
        return int(self.path.name[:2])

    @property
    def title(self) -> str:
        "The first heading, without a number in front."
        first = next((c.source for c in self.markdown if c.source.startswith("# ")), "# ")
        return re.sub(r"^\d\d\W+", "", first.splitlines()[0][2:].strip())

    @property
    def modules(self) -> list[str]:
        "The names after default_exp."
        return [c.directives["default_exp"] for c in self.code if "default_exp" in c.directives]

    @property
    def headings(self) -> list[str]:
        return [
            line.lstrip("#").strip()
            for c in self.markdown
            for line in c.source.splitlines()
            if re.match(r"#{1,6} ", line)
        ]


def name(path: Path) -> str:
    "A test's id: solutions are told from lessons."
    return f"solutions/{path.stem}" if path.parent.name == "solutions" else path.stem


def text_outputs(cell: Cell) -> list[str]:
    "What a reader of the cell's outputs sees as text: streams, plain text and HTML."
    texts = []
    for out in cell.outputs:
        parts = [out.get("text", "")] + [
            v for k, v in out.get("data", {}).items() if k.startswith("text/")
        ]
        texts += ["".join(p) for p in parts if isinstance(p, (str, list))]
    return [t for t in texts if t]


def imported_modules(tree: ast.AST) -> set[str]:
    "Names of cmmd's modules that the code imports, also inside functions."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("cmmd.")}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module == "cmmd":
                parts = module.split(".") if node.level and module else []
            elif module.startswith("cmmd."):
                parts = module.split(".")[1:]
            else:
                continue
            found |= {parts[0]} if parts else {a.name for a in node.names}
    return found - {"__version__"}


def defined_names(tree: ast.Module) -> list[str]:
    "Functions, classes and assigned names at the top level."
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        names += [
            n.id
            for t in targets
            for n in ast.walk(t)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        ]
    return names


# For every program the tests start: offline, no windows, one thread, nothing in the home folder.
_CACHE = ROOT / ".cache"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": str(_CACHE / "huggingface"),
    "JUPYTER_CONFIG_DIR": str(_CACHE / "jupyter"),
    "JUPYTER_DATA_DIR": str(_CACHE / "jupyter/data"),
    "JUPYTER_RUNTIME_DIR": str(_CACHE / "jupyter/runtime"),
    "IPYTHONDIR": str(_CACHE / "ipython"),
    "MPLCONFIGDIR": str(_CACHE / "matplotlib"),
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
