"""What installing the wheel gives: the weights, no tests, no links, and a model that works."""

from __future__ import annotations

import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import diffsteer

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("core", "guidance", "samplers", "pipelines", "eval", "training")
MAX_WEIGHTS = 20 * 2**20

GENERATE = """
import diffsteer
pipe = diffsteer.load_embedded()
pipe.set_progress_bar_config(disable=True)
with diffsteer.steer(pipe, diffsteer.AdaptiveProjectedGuidance(scale=3.0)):
    images = pipe([3], seeds=[0], num_inference_steps=4, guidance_scale=3.0).images
print(diffsteer.__file__, diffsteer.__version__, len(images), images[0].size)
"""


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist, built from a copy of what git would hand to somebody."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(
                (ROOT / name).readlink() if (ROOT / name).is_symlink() else ROOT / name
            )
    build = "from setuptools import build_meta as b; print(b.{0}({1!r}))"
    for hook in ("build_sdist", "build_wheel"):
        run(sys.executable, "-c", build.format(hook, str(out)), cwd=source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def files(built: dict[str, Path]) -> dict[str, zipfile.ZipInfo]:
    """What the wheel holds."""
    with zipfile.ZipFile(built["wheel"]) as wheel:
        return {info.filename: info for info in wheel.infolist()}


def test_the_wheel_holds_the_package_and_nothing_else(files: dict[str, zipfile.ZipInfo]) -> None:
    tops = {name.split("/")[0] for name in files}
    assert tops == {"diffsteer", f"diffsteer-{diffsteer.__version__}.dist-info"}
    assert "diffsteer/py.typed" in files
    in_repository = {
        f"diffsteer/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    in_wheel = {name for name in files if name.endswith(".py")}
    assert in_wheel == in_repository | {"diffsteer/__init__.py", "diffsteer/_version.py"}
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_the_wheel_holds_the_weights(files: dict[str, zipfile.ZipInfo]) -> None:
    weights = [name for name in files if name.endswith(".safetensors")]
    in_repository = [
        path
        for folder in ("pipelines", "eval")
        for path in (ROOT / folder).rglob("*.safetensors")
        if not path.name.startswith(".")
    ]
    assert len(weights) == len(in_repository)
    assert any(name.startswith("diffsteer/pipelines/") for name in weights), "no embedded model"
    assert any(name.startswith("diffsteer/eval/") for name in weights), "no classifier"
    assert sum(files[name].file_size for name in weights) <= MAX_WEIGHTS


def test_nothing_is_a_link(built: dict[str, Path], files: dict[str, zipfile.ZipInfo]) -> None:
    assert not [n for n, info in files.items() if stat.S_ISLNK(info.external_attr >> 16)]
    with tarfile.open(built["sdist"]) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert {"pyproject.toml", "setup.py", "src/diffsteer/guidance/cfg.py"} <= set(members)
    assert not [name for name in members if name.startswith("tests")]


def test_an_installed_wheel_generates_without_the_repository_or_a_network(
    built: dict[str, Path], tmp_path: Path
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run(*pip, "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(built["wheel"]))
    # torch and diffusers come from this environment; the proxy makes any request fail at once.
    nowhere = "http://127.0.0.1:9"
    environment = {
        "PATH": "",
        "PYTHONPATH": str(site),
        "HOME": str(elsewhere),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "OMP_NUM_THREADS": "1",
    }
    shown = run(sys.executable, "-c", GENERATE, cwd=elsewhere, env=environment)
    home, version, count, *size = shown.split()[-5:]
    assert Path(home).is_relative_to(site)
    assert version == diffsteer.__version__
    assert (count, " ".join(size)) == ("1", "(32, 32)")
    assert not list(elsewhere.rglob("*.py")), "generating wrote into the current folder"
