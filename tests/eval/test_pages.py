"""Reports for people: one file, complete, loading nothing; figures; copies side by side."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from eval_samples import tensors, tiny_extractor
from PIL import Image

from diffsteer.eval import EvalSuite, Reading, evaluate
from diffsteer.eval.images import open_images
from diffsteer.eval.pages import grids_of, write_page, write_plots
from diffsteer.eval.plots import curves_over_k, infinity_fit
from diffsteer.eval.report import read_result
from diffsteer.eval.run import set_reference
from diffsteer.eval.runs import guidance_scale, incomplete, sweep_axis

pytest.importorskip("matplotlib")


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.open, self.images = [], [], 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[k] for k in ("src", "href") if attrs.get(k)]
        self.images += tag == "img"
        if tag not in ("meta", "img", "br", "tr", "td", "th", "li"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass


@pytest.fixture
def sweep(make_folder, tmp_path):
    """Two folders at two scales, evaluated against a third."""
    folders = {}
    for scale in (4.0, 2.0):
        folder = make_folder(f"scale{scale}", 24, seed=int(scale))
        run = json.loads((folder / "run.json").read_text())
        rule = {"class": "ClassifierFreeGuidance", "arguments": {"scale": scale}}
        run["config"] = {"guidance": {"class": "GuidanceInterval", "arguments": {"rule": rule}}}
        (folder / "run.json").write_text(json.dumps(run))
        folders[str(folder)] = scale
    real = make_folder("real", 24, seed=9)
    first = sorted((tmp_path / "scale2.0" / "images").iterdir())[0]
    shutil.copy(real / "images" / "000005.png", first)  # a memorised image
    suite = EvalSuite(extractors=tiny_extractor())
    set_reference(suite, real, Reading(workers=0))
    results, grids = {}, []
    for folder in folders:
        results[folder] = evaluate(folder, suite=suite, reading=Reading(workers=0))
        grids += grids_of(suite, folder, str(real))
    return results, grids, real


def test_the_page_is_whole_and_loads_nothing(sweep, tmp_path):
    results, grids, _ = sweep
    page = tmp_path / "report.html"
    write_page(page, results, grids, class_names=tuple("abcd"))
    text, reader = page.read_text(), Reader()
    reader.feed(text)
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not reader.open
    # Curves of every metric, precision-recall, bars of both, and all grid images.
    metrics = len(next(iter(results.values())).scores)
    assert reader.images == metrics + 1 + 2 + sum(len(images) for _, images in grids)
    for name in ("fd-tiny", "precision", "exact copies of real ones", "TinyNet@"):
        assert name in text
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_page(page, results, grids)


BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome"))), None)  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on PATH")
def test_the_page_renders_in_a_browser(sweep, tmp_path):
    results, grids, _ = sweep
    write_page(tmp_path / "report.html", results, grids)
    picture = tmp_path / "page.png"
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", f"--screenshot={picture}",
         "--window-size=1200,2000", (tmp_path / "report.html").as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(picture) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 50


def test_the_copy_is_shown_beside_its_original(sweep):
    _, grids, real = sweep
    _, pairs = next(g for g in grids if g[0].startswith("Samples closest") and "scale2.0" in g[0])
    (sample, _), (original, note) = pairs[0], pairs[1]
    assert bool((sample == original).all()) and "000005.png" in note
    assert bool((original == open_images(real).image(5)).all())


def test_plots_are_written_for_a_sweep(sweep, tmp_path):
    results, _, _ = sweep
    written = write_plots(tmp_path / "plots", results)
    assert {"fd-tiny.png", "precision_recall.png"} <= {path.name for path in written}
    assert all(path.stat().st_size > 2000 for path in written)


def test_a_result_alone_has_figures_of_its_own(tmp_path, extractor):
    suite = EvalSuite(("pr", "over_k", "accuracy"), extractors=extractor)
    suite.update(tensors(30, 1), real=True)
    suite.update(tensors(30, 2), labels=[i % 4 for i in range(30)])
    result = suite.compute()
    written = {p.stem for p in write_plots(tmp_path, {"a": result}, class_names=tuple("abcd"))}
    assert written == {"precision_recall", "scores_over_k", "accuracy_by_class"}
    lines = curves_over_k(result).axes[0].lines
    assert [line.get_label() for line in lines] == ["precision", "recall", "density", "coverage"]
    assert lines[1].get_ydata()[2] == result.values["recall"]  # k = 3
    write_page(tmp_path / "page.html", {"a": result}, [])
    assert "scores over k" in (tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match="over_k"):
        curves_over_k(replace(result, curves={}))


def test_the_line_to_infinitely_many_samples_is_drawn(tmp_path, extractor):
    suite = EvalSuite(("fd", "fd_infinity"), extractors=extractor)
    suite.update(tensors(60, 1), real=True)
    suite.update(tensors(60, 2))
    result = suite.compute()
    counts, distances = result.curves["fd-tiny-infinity"]
    assert counts[-1] == 60 and distances[-1] == pytest.approx(result.values["fd-tiny"])
    assert read_result_of(result, tmp_path).curves == result.curves
    (written,) = (p for p in write_plots(tmp_path, {"a": result}) if p.stem.endswith("_fit"))
    assert written.stat().st_size > 2000
    page = tmp_path / "report.html"
    write_page(page, {"a": result}, [])
    assert "fd-tiny-infinity" in page.read_text()
    line = infinity_fit(result, "fd-tiny-infinity").axes[0].lines[1]
    assert line.get_xydata()[0].tolist() == [0, result.values["fd-tiny-infinity"]]
    fitted = np.polyfit(1 / np.array(counts), distances, 1)
    assert line.get_xydata()[1][1] == pytest.approx(np.polyval(fitted, line.get_xydata()[1][0]))
    with pytest.raises(ValueError, match="fd_infinity"):
        infinity_fit(result, "kid")


def read_result_of(result, folder):
    (folder / "metrics.json").write_text(result.to_json())
    return read_result(folder / "metrics.json")


def test_scales_are_read_through_wrappers(sweep):
    results, _, real = sweep
    assert sweep_axis(list(results)) == [4.0, 2.0]
    assert sweep_axis([*results, str(real)]) is None
    assert guidance_scale({"config": {"guidance": None}}) is None
    assert guidance_scale({"config": {"guidance": {"arguments": {"scale": "cosine:8:1"}}}}) is None


def test_an_unfinished_folder_is_said(make_folder):
    folder = make_folder("a", 12)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "complete": False}))
    assert "not complete" in incomplete(folder)[0]
    suite = EvalSuite(("colour",), extractors=tiny_extractor())
    suite.update(tensors(12), real=True)
    result = evaluate(folder, suite=suite, reading=Reading(workers=0))
    assert any("not complete" in warning for warning in result.warnings)
