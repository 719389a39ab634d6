"""The command line: from folders to a table and JSON, and every wrong turn."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from eval_samples import TinyNet, tiny_extractor
from PIL import Image
from scripts_main import load

import diffsteer.eval.pretrained as pretrained
from diffsteer.eval import Extractor, read_statistics


@pytest.fixture
def script(monkeypatch, tmp_path):
    module = load("evaluate")
    monkeypatch.setitem(pretrained.EXTRACTORS, "cifar", lambda settings, device: tiny_extractor())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module


@pytest.fixture
def folders(make_folder):
    return str(make_folder("fake", 40, seed=1)), str(make_folder("real", 40, seed=2))


def scored(script, capsys, *arguments):
    code = script.main([*arguments, "--json", "-", "--metrics", "all"])
    out = capsys.readouterr()
    assert code == 0, out.err
    return json.loads(out.out)


def test_json_alone_on_standard_output(script, folders, capsys):
    fake, real = folders
    found = scored(script, capsys, fake, "--reference", real)
    assert found["labels"]["fd-tiny"] == "fd-tiny@40"
    assert {"precision", "accuracy", "saturation", "contrast", "clipped"} <= set(found["values"])
    assert found["meta"]["extractors"]["tiny"].startswith("TinyNet@")
    assert found["meta"]["settings"]["k"] == 3 and found["meta"]["versions"]["torch"]


def test_names_and_batches_and_the_cache_change_no_digit(script, folders, capsys, make_folder):
    fake, real = folders
    first = scored(script, capsys, fake, "--reference", real)
    images = sorted((Path(fake) / "images").iterdir())
    run = json.loads((Path(fake) / "run.json").read_text())
    for i, image in enumerate(images):  # other names, in the opposite order
        image.rename(image.with_name(f"x{99 - i}.png"))
        run["images"][i]["file"] = f"images/x{99 - i}.png"
    (Path(fake) / "run.json").write_text(json.dumps(run))
    for options in ([], ["--batch-size", "7", "--workers", "1", "--no-cache"]):
        again = scored(script, capsys, fake, "--reference", real, *options)
        assert again["values"] == first["values"] and again["stderr"] == first["stderr"]


def test_a_changed_folder_is_not_taken_from_the_cache(script, folders, capsys):
    fake, real = folders
    first = scored(script, capsys, fake, "--reference", real)
    hit = scored(script, capsys, fake, "--reference", real)
    assert hit["values"] == first["values"]
    Image.new("RGB", (16, 16), (255, 0, 0)).save(Path(fake) / "images" / "000000.png")
    changed = scored(script, capsys, fake, "--reference", real)
    assert changed["values"]["saturation"] != first["values"]["saturation"]


def test_statistics_replace_the_images_they_were_made_of(script, folders, capsys, tmp_path):
    fake, real = folders
    out = str(tmp_path / "ref.npz")
    assert script.main(["stats", real, "--out", out, "--features"]) == 0
    by_images = scored(script, capsys, fake, "--reference", real)["values"]
    by_file = scored(script, capsys, fake, "--reference", out)["values"]
    assert by_file["fd-tiny"] == pytest.approx(by_images["fd-tiny"], rel=1e-9)
    assert by_file["kid-tiny"] == pytest.approx(by_images["kid-tiny"], rel=1e-2)  # float16 rows
    assert script.main(["stats", real, "--out", out]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert script.main(["convert", out, str(tmp_path / "copy.npz")]) == 0


def test_several_folders_give_one_table_and_one_file(
    script, folders, capsys, tmp_path, make_folder
):
    fake, real = folders
    other = str(make_folder("other", 40, seed=3))
    out = tmp_path / "out"
    arguments = [fake, other, "--reference", real, "--out", str(out)]
    assert script.main(arguments) == 0
    text = capsys.readouterr().err
    assert fake in text and other in text and "fd-tiny@40" in text
    assert set(json.loads((out / "metrics.json").read_text())["results"]) == {fake, other}
    before = (out / "metrics.json").read_bytes()
    assert script.main(arguments) == 2
    assert (out / "metrics.json").read_bytes() == before
    assert script.main([*arguments, "--overwrite"]) == 0


def test_compare_shows_results_side_by_side_and_warns_of_other_settings(
    script, folders, capsys, tmp_path
):
    fake, real = folders
    for name, k in (("a", "3"), ("b", "5")):
        script.main([fake, "--reference", real, "--out", str(tmp_path / name), "--k", k])
    capsys.readouterr()
    assert script.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    found = capsys.readouterr()
    assert "precision@40" in found.out and "differ in settings" in found.err
    other = fake + "/images"
    script.main([fake, other, "--reference", real, "--out", str(tmp_path / "both")])
    capsys.readouterr()
    assert script.main(["compare", str(tmp_path / "a"), str(tmp_path / "both")]) == 0
    heads = capsys.readouterr().out.split("\n")[0].split()
    assert heads == ["metric", str(tmp_path / "a" / "metrics.json"), fake, other]


def test_strict_turns_warnings_into_an_exit_code(script, folders):
    fake = folders[0]
    assert script.main([fake, "--reference", fake, "--strict"]) == 3  # copies of real samples
    assert script.main([fake, "--reference", fake]) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no samples given"),
        (["nowhere"], "nowhere"),
        (["FAKE", "--reference", "nowhere"], "nowhere"),
        (["FAKE", "--metrics", "fd, beauty"], "'beauty'"),
        (["FAKE", "--batch-size", "0"], "batch_size must be at least 1"),
        (["stats", "REAL", "--out", "out.npz", "--extractor", "cifar", "clip"], "one space"),
        (["FAKE", "--reference", "REAL", "--num", "41"], "num = 41"),
        (["FAKE", "--reference", "REAL", "--k", "0"], "k must be at least 1"),
        (["FAKE", "--reference", "REAL", "--labels", "nowhere.csv"], "nowhere.csv"),
        (["compare", "nowhere"], "nowhere"),
        (["convert", "nowhere.pkl", "out.npz"], "nowhere.pkl"),
    ],
)
def test_bad_input_names_the_argument_and_exits_with_two(script, folders, capsys, arguments, words):
    names = {"FAKE": folders[0], "REAL": folders[1]}
    assert script.main([names.get(a, a) for a in arguments]) == 2
    found = capsys.readouterr()
    assert words in found.err and not found.out
    assert not os.path.exists("out.npz")


def test_an_unreadable_image_fails_or_is_skipped_and_listed(script, folders, capsys, make_folder):
    fake, real = folders
    (Path(fake) / "images" / "000007.png").write_bytes(b"nonsense")
    assert script.main([fake, "--reference", real]) == 2
    assert "000007.png" in capsys.readouterr().err
    found = scored(script, capsys, fake, "--reference", real, "--on-error", "skip")
    assert "000007.png" in found["meta"]["skipped_images"][0]
    assert found["labels"]["saturation"] == "saturation@39"


def test_an_image_without_finite_features_is_named_or_left_out(
    script, folders, capsys, monkeypatch
):
    fake, real = folders
    Image.new("RGB", (16, 16), (255, 255, 255)).save(Path(fake) / "images" / "000007.png")

    class Fragile(TinyNet):
        def forward(self, images):
            taps = super().forward(images)
            taps.features[images.amin((1, 2, 3)) == 1] = float("nan")
            return taps

    made = Extractor(Fragile(), space="tiny", side=16, micro_batch=8, class_names=tuple("abcd"))
    monkeypatch.setitem(pretrained.EXTRACTORS, "cifar", lambda settings, device: made)
    assert script.main([fake, "--reference", real]) == 2
    error = capsys.readouterr().err
    assert "000007.png" in error and "Fragile gives NaN" in error
    found = scored(script, capsys, fake, "--reference", real, "--on-error", "skip")
    assert found["labels"]["precision"] == "precision@39"
    assert any("Fragile gives NaN" in warning for warning in found["warnings"])


def test_a_page_and_plots_are_written_beside_the_result(script, folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    fake, real = folders
    page, out = tmp_path / "report.html", tmp_path / "out"
    arguments = [fake, fake + "/images", "--reference", real, "--out", str(out), "--plots"]
    assert script.main([*arguments, "--html", str(page)]) == 0
    assert "<table>" in page.read_text() and (out / "precision_recall.png").is_file()
    assert script.main([fake, "--reference", real, "--html", str(page)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert script.main([fake, "--reference", real, "--plots"]) == 2


def test_an_existing_json_file_is_kept_and_said_before_any_work(script, folders, tmp_path, capsys):
    text = tmp_path / "result.json"
    text.write_text("mine")
    assert script.main([folders[0], "--json", str(text)]) == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error and "fd-tiny" not in error and text.read_text() == "mine"
    assert script.main([folders[0], "--json", str(text), "--overwrite"]) == 0
    assert json.loads(text.read_text())["values"]


def test_statistics_name_the_data_and_no_place_on_this_machine(script, folders, tmp_path):
    (Path(folders[1]) / "images" / "notes.txt").write_text("no image")
    assert script.main(["stats", folders[1], "--out", str(tmp_path / "ref.npz")]) == 0
    header = read_statistics(tmp_path / "ref.npz").header
    assert header["data"] == "real" and header["warnings"]
    assert str(tmp_path) not in json.dumps(header)


def test_the_curves_over_k_are_scored_where_they_are_named(script, folders, capsys):
    options = [folders[0], "--reference", folders[1], "--json", "-", "--metrics"]
    assert script.main([*options, "all"]) == 0
    assert "recall-over-k" not in json.loads(capsys.readouterr().out)["curves"]
    assert script.main([*options, "all,over_k"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["curves"]["recall-over-k"][1][2] == found["values"]["recall"]  # k = 3


def test_without_a_reference_what_needs_none_is_scored(script, folders, capsys):
    found = scored(script, capsys, folders[0])
    assert "saturation" in found["values"] and "accuracy" in found["values"]
    assert "no statistics" in found["skipped"]["fd_infinity"]


def test_a_random_subset_is_seeded(script, folders, capsys):
    fake, real = folders
    options = [fake, "--reference", real, "--num", "20"]
    first = scored(script, capsys, *options)
    assert first["labels"]["precision"] == "precision@20"
    assert scored(script, capsys, *options)["values"] == first["values"]
    assert scored(script, capsys, *options, "--seed", "1")["values"] != first["values"]


def test_prompts_are_scored_from_the_command_line(script, folders, capsys, tmp_path):
    pytest.importorskip("transformers")
    from tiny_clip import tiny_clip

    for part in tiny_clip():
        part.save_pretrained(tmp_path / "clip")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"picture {i % 3}" for i in range(40)))
    options = [folders[0], "--reference", folders[1], "--scorer", f"clip={tmp_path / 'clip'}"]
    found = scored(script, capsys, *options, "--prompts", str(prompts))
    assert found["labels"]["clip"] == "clip@40" and found["stderr"]["clip"] > 0
    assert found["meta"]["scorers"]["clip"].startswith("clip@")
    assert "--prompts" in scored(script, capsys, *options)["skipped"]["clip"]
    assert script.main([folders[0], "--scorer", "beauty"]) == 2
    assert "beauty" in capsys.readouterr().err


def test_bounded_rows_and_a_verified_cache(script, folders, capsys):
    fake, real = folders
    whole = scored(script, capsys, fake, "--reference", real)
    found = scored(script, capsys, fake, "--reference", real, "--max-rows", "20", "--cache-verify")
    assert found["labels"]["precision"] == "precision@20" and found["meta"]["rows"]["kept"] == 20
    assert found["values"]["fd-tiny"] == pytest.approx(whole["values"]["fd-tiny"], rel=1e-9)
    assert found["values"]["accuracy"] == whole["values"]["accuracy"]
