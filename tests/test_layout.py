"""The shape of the repository: links, exports, sizes, import direction, the cost of an import."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffsteer

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "diffsteer"
FOLDERS = ("core", "guidance", "samplers", "pipelines", "eval", "training")
MAX_FILE, MAX_FUNCTION = 300, 40


def sources(*folders: str) -> list[Path]:
    """The Python files of these folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def run_python(code: str, **options: object) -> str:
    """What ``code`` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **options
    )
    return done.stdout


# -- links and exports ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_links_to_the_folders_at_the_root(folder: str) -> None:
    link = PACKAGE / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{folder}"
    assert (link / "__init__.py").is_file()


def test_the_build_stops_in_a_checkout_without_links(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    package = tmp_path / "src" / "diffsteer"
    package.mkdir(parents=True)
    for folder in FOLDERS:  # what git writes where it cannot make a link
        (package / folder).write_text(f"../../{folder}")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "core.symlinks true" in done.stderr


def package_names() -> list[str]:
    """Every package of diffsteer, by its dotted name."""
    found = [f"diffsteer.{name}" for name in FOLDERS]
    for name in list(found):
        path = importlib.import_module(name).__path__
        found += [m.name for m in pkgutil.walk_packages(path, f"{name}.") if m.ispkg]
    return found


def test_every_package_lists_what_it_exports() -> None:
    for name in ("diffsteer", *package_names()):
        module = importlib.import_module(name)
        assert module.__doc__, f"{name} has no docstring"
        exported = module.__all__
        assert len(exported) == len(set(exported)), f"{name}.__all__ repeats a name"
        missing = [entry for entry in exported if not hasattr(module, entry)]
        assert not missing, f"{name}.__all__ names {missing}, which are not there"
        hidden = [e for e in exported if e.startswith("_") and e != "__version__"]
        assert not hidden, f"{name}.__all__ exports private names: {hidden}"


def test_every_public_object_says_what_it_is() -> None:
    for name in package_names():
        module = importlib.import_module(name)
        for entry in module.__all__:
            item = getattr(module, entry)
            if callable(item):
                assert (item.__doc__ or "").strip(), f"{name}.{entry} has no docstring"


def test_the_front_door_opens() -> None:
    from diffsteer import guidance

    lazy = set(diffsteer._HOME) | {"__version__"}
    assert lazy == set(diffsteer.__all__)
    for rule in guidance.__all__:
        assert getattr(diffsteer, rule) is getattr(guidance, rule)
        assert rule in dir(diffsteer)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        diffsteer.nonsense  # noqa: B018


def test_type_checkers_see_the_front_door() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body for alias in node.names if alias.name != "*"}
    assert seen == set(diffsteer._HOME)


# -- sizes and words -----------------------------------------------------------------------------


def function_lengths(path: Path) -> list[tuple[int, str]]:
    """Lines of each function without its docstring, and where it is."""
    lengths = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            lengths.append((length, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return lengths


@pytest.mark.parametrize("folder", (*FOLDERS, "scripts"))
def test_files_and_functions_stay_short(folder: str) -> None:
    files = [(len(path.read_text().splitlines()), path) for path in sources(folder)]
    assert files, f"no Python file in {folder}/"
    bad = [f"{path.relative_to(ROOT)}: {n} lines" for n, path in files if n > MAX_FILE]
    for _, path in files:
        bad += [f"{where}: {n} lines" for n, where in function_lengths(path) if n > MAX_FUNCTION]
    assert not bad, "split these:\n" + "\n".join(bad)


def files_to_read() -> list[Path]:
    """Every file of the repository that a person would read."""
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".cff", ".json", ""}
    skip = {"out", "runs", "data", "build", "dist", "__pycache__"}
    found = []
    for base, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f == ".ci" or not (f in skip or f.startswith("."))]
        folders[:] = [f for f in folders if not f.endswith(".egg-info")]
        found += [Path(base, name) for name in names if Path(name).suffix in suffixes]
    return [path for path in found if not path.is_symlink() and path.stat().st_size < 2**20]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    places = "|".join(("work", "tmp", "home", "root", "opt", "Users", "mnt"))
    absolute = re.compile(rf"(?<![\w.~*{{}}\])/-])/(?:{places})(?:/|\b(?=[\"'`\s)]))")
    bad = []
    for path in files_to_read():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if absolute.search(line) and not line.startswith("#!"):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not bad, "\n".join(bad)


# -- import direction and cost -------------------------------------------------------------------


def test_outsiders_import_public_names_only() -> None:
    bad = []
    for path in sources("scripts", "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffsteer"):
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                if any(part.startswith("_") and part != "__version__" for part in parts):
                    bad.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not bad, "\n".join(bad)


def test_imports_inside_the_package_are_relative() -> None:
    bad = []
    for path in sources(*FOLDERS):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if any(name.split(".")[0] in ("diffsteer", *FOLDERS) for name in names):
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not bad, "\n".join(bad)


# what is imported, the contract that forbids it, the file that tries, its line
PLANTED = {
    "up": ("guidance/cfg.py", "point down only", "core/step.py", "from ..guidance import cfg"),
    "across": ("eval/fid.py", "point down only", "samplers/ode.py", "from ..eval import fid"),
    "diffusers": ("guidance/cfg.py", "know torch only", "guidance/apg.py", "import diffusers"),
    "pipeline": ("eval/fid.py", "know no pipelines", "samplers/ode.py", "import diffusers"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_import_contracts_catch_a_planted_violation(planted: str, tmp_path: Path) -> None:
    target, contract, path, line = PLANTED[planted]
    package = tmp_path / "diffsteer"
    for folder in FOLDERS:
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / target).touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or "lint-imports"

    def lint() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
        return subprocess.run(
            [tool, "--no-cache"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert lint().returncode == 0
    (package / path).write_text(line + "\n")
    broken = lint()
    assert broken.returncode != 0
    assert f"{contract} BROKEN" in " ".join(broken.stdout.split())


def test_import_diffsteer_loads_nothing_heavy() -> None:
    loaded = run_python("import sys, diffsteer; print(*sys.modules)").split()
    assert "diffsteer" in loaded
    assert not {"torch", "diffusers", "transformers", "numpy"} & set(loaded)


def test_the_lower_folders_load_without_diffusers() -> None:
    folders = "diffsteer.core, diffsteer.guidance, diffsteer.samplers, diffsteer.eval"
    loaded = run_python(f"import sys, {folders}; print(*sys.modules)").split()
    assert "diffsteer.eval" in loaded
    heavy = {"diffusers", "transformers", "accelerate", "datasets", "peft", "matplotlib"}
    assert not heavy & set(loaded)
