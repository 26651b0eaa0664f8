"""The layout of the code: imports run down the floors of docs/code.md, files are short."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLOORS = {
    "train": 8, "sample": 8, "convert": 8, "evaluate": 8, "bench": 8, "app": 8,
    "training": 7, "evaluation": 7, "export": 7, "api": 7,
    "painting": 6,
    "checkpoints": 5,
    "experiment": 4, "weights": 4,
    "models": 3, "data": 3,
    "sharding": 2, "diffusion": 2, "pictures": 2,
    "base": 1,
}  # fmt: skip
MAINS = {"train", "sample", "convert", "evaluate"}
LONGEST = 600  # lines of a file


def room(module: str) -> str:
    """'data' of 'qk_jax.data.synthesis.tasks'; '' of the package itself."""
    return module.partition(".")[2].partition(".")[0]


def floor(module: str) -> int:
    """Of a module; a main of a room stands above all rooms."""
    return 8 if module.endswith(".__main__") else FLOORS[room(module)]


def is_main(module: str) -> bool:
    return room(module) in MAINS or module.endswith(".__main__")


def modules(root: pathlib.Path) -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of every Python file of root/qk_jax."""
    found = {}
    for path in sorted((root / "qk_jax").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text(), str(path))
    return found


def imports(trees: dict[str, ast.Module]) -> dict[str, dict[str, int]]:
    """{module: {module of the project that it imports anywhere, also in a function: line}}."""
    found: dict[str, dict[str, int]] = {name: {} for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}:{node.lineno}: relative import"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [one if one in trees else node.module for one in whole]
            else:
                continue
            for target in targets:
                if target.partition(".")[0] == "qk_jax" and target not in ("qk_jax", name):
                    found[name].setdefault(target, node.lineno)
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The names along one circle, or none."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def wrong_arrows(root: pathlib.Path) -> list[str]:
    """Each import that breaks the order of the floors, as a line for the reader."""
    found = imports(modules(root))
    lines = []
    rooms: dict[str, set[str]] = {}
    for name, targets in found.items():
        for target, line in targets.items():
            here, there = room(name), room(target)
            where = f"{name}:{line} imports {target}"
            if {here, there} - FLOORS.keys() - {""}:
                lines.append(f"{where}: a room without a floor; add it to FLOORS and docs/code.md")
            elif here and FLOORS[there] > floor(name):
                lines.append(f"{where}: up, from floor {FLOORS[here]} to {FLOORS[there]}")
            elif is_main(target):
                lines.append(f"{where}: a main")
            elif here != there and not name.endswith(".__main__"):
                rooms.setdefault(here, set()).add(there)
    for kind, arrows in (("rooms", rooms), ("files", {n: set(t) for n, t in found.items()})):
        if names := circle(arrows):
            lines.append(f"a circle of {kind}: {' -> '.join(names)}")
    return lines


def bad_files(root: pathlib.Path) -> list[str]:
    """Each file that is too long or does not say what it is, and each folder without `__init__`."""
    lines = []
    for part in ("qk_jax", "launch", "configs", "tests"):
        for path in sorted((root / part).rglob("*.py")):
            text, name = path.read_text(), path.relative_to(root)
            if (count := len(text.splitlines())) > LONGEST:
                lines.append(f"{name}: {count} lines, more than {LONGEST}")
            if not ast.get_docstring(ast.parse(text)):
                lines.append(f"{name}: no docstring")
            if part == "qk_jax" and not (path.parent / "__init__.py").is_file():
                lines.append(f"{name}: no __init__.py beside it that says what the folder holds")
    return lines


def test_imports_run_down():
    assert wrong_arrows(ROOT) == []


def test_files_are_short_and_say_what_they_are():
    assert bad_files(ROOT) == []


def test_the_page_about_the_code_has_the_same_floors():
    page = (ROOT / "docs" / "code.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*?) \|", page, re.MULTILINE)
    told = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)", names)}
    assert told == FLOORS


def build(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    """A small project with these files; folders get an `__init__`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").write_text('"""A room."""\n')
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"data/a.py": "from qk_jax.training import step"}, "data.a:1 imports qk_jax.training"),
        ({"data/a.py": "def f():\n    import qk_jax.weights"}, "data.a:2 .* from floor 3 to 4"),
        ({"bench/a.py": "from qk_jax import train", "train.py": ""}, "qk_jax.train: a main"),
        ({"bench/a.py": "import qk_jax.bench.__main__", "bench/__main__.py": ""}, ": a main"),
        ({"data/a.py": "from qk_jax.weights import b", "data/__main__.py": "import qk_jax.weights"},
         "data.a:1 .* from floor 3 to 4"),
        ({"data/a.py": "import qk_jax.parlour"}, "without a floor"),
        (
            {"data/a.py": "import qk_jax.models", "models/a.py": "from qk_jax import data",
             "models/__init__.py": "", "data/__init__.py": ""},
            "circle of rooms: (data -> models -> data|models -> data -> models)",
        ),
        (
            {"data/a.py": "from qk_jax.data import b", "data/b.py": "import qk_jax.data.a"},
            "circle of files: (qk_jax.data.[ab]( -> )?){3}",
        ),
    ],
)  # fmt: skip
def test_a_wrong_arrow_is_named(tmp_path, files, words):
    root = build(tmp_path, {f"qk_jax/{name}": text for name, text in files.items()})
    (line,) = wrong_arrows(root)
    assert re.search(words, line)


def test_a_bad_file_is_named(tmp_path):
    root = build(
        tmp_path, {"qk_jax/data/a.py": '"""Long."""\n' + "\n" * 600, "tests/b.py": "x = 1"}
    )
    (root / "qk_jax" / "data" / "__init__.py").unlink()
    assert bad_files(root) == [
        "qk_jax/data/a.py: 601 lines, more than 600",
        "qk_jax/data/a.py: no __init__.py beside it that says what the folder holds",
        "tests/b.py: no docstring",
    ]
