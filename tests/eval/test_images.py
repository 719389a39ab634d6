"""Reading images: every mode of a file, every source, nothing dropped or wrong in silence."""

from __future__ import annotations

import io
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from eval_samples import pictures
from PIL import Image

from diffsteer.eval import open_images
from diffsteer.eval.content import content_keys
from diffsteer.eval.decode import ImageError, as_uint8, decode
from diffsteer.eval.images import batches
from diffsteer.eval.labels import find_labels


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(image, **options):
    notes = Counter()
    return decode(encoded(image), "x.png", notes=notes, **options), notes


def test_rgb_is_read_as_it_is():
    picture = pictures(1)[0]
    found, notes = read(Image.fromarray(picture))
    assert (found.permute(1, 2, 0).numpy() == picture).all() and not notes


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 257 * 7, 257 * 128, 65535]], np.uint16)
    found, notes = read(Image.fromarray(values))
    assert found[0].tolist() == [[0, 7, 128, 255]] and bool((found == found[:1]).all())
    assert "16-bit" in next(iter(notes))


def test_grey_is_repeated_and_palettes_are_looked_up():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    found, notes = read(Image.fromarray(grey))
    assert (found.numpy() == grey).all() and "grey" in next(iter(notes))
    few = Image.fromarray(np.repeat(pictures(1)[0][:1], 16, 0)).quantize(16)
    found, notes = read(few)
    assert (found.permute(1, 2, 0).numpy() == np.array(few.convert("RGB"))).all()
    assert "palette" in next(iter(notes))


def test_transparency_is_laid_on_white_or_refused():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    found, notes = read(Image.fromarray(rgba))
    assert found[:, 0, 0].tolist() == [10, 20, 30] and found[:, 1, 1].tolist() == [255] * 3
    assert "transparent" in next(iter(notes))
    with pytest.raises(ImageError, match=r"x\.png.*transparent"):
        read(Image.fromarray(rgba), alpha="error")
    rgba[..., 3] = 255
    assert not read(Image.fromarray(rgba), alpha="error")[1]  # opaque: nothing is lost
    key = Image.fromarray(rgba[..., :3])  # one colour stands for transparent
    found = decode(encoded(key, transparency=(0, 0, 0)), "x.png")
    assert found[:, 0, 0].tolist() == [10, 20, 30] and found[:, 1, 1].tolist() == [255] * 3


def test_cmyk_jpeg_is_converted_and_noted():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    notes = Counter()
    found = decode(data, "x.jpg", notes=notes)
    assert found[0].float().mean() > 200 and found[1].float().mean() < 60
    assert any("CMYK" in note for note in notes) and any("JPEG" in note for note in notes)


@pytest.mark.parametrize(
    "data", [b"", b"no image at all", encoded(Image.new("RGB", (64, 64)))[:60]]
)
def test_corrupt_and_truncated_images_name_the_file(data):
    with pytest.raises(ImageError, match=r"broken\.png"):
        decode(data, "broken.png")


def test_floats_are_clamped_and_rounded_and_never_wrap():
    x = torch.tensor([[[0.999, 1.004, -0.004, 0.5]]])
    assert as_uint8(x).flatten().tolist() == [255, 255, 0, 128]
    assert as_uint8(x, quantise="truncate").flatten().tolist() == [254, 255, 0, 127]
    signed = torch.tensor([[[-1.0, 1.0, 0.0]]])
    assert as_uint8(signed, quantise="edm").flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize("x", [torch.rand(3, 4, 4) * 2 - 1, torch.rand(3, 4, 4) * 255])
def test_other_ranges_are_refused_with_the_remedy(x):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        as_uint8(x)


def test_other_integers_are_refused():
    with pytest.raises(TypeError, match="int64"):
        as_uint8(torch.zeros(3, 4, 4, dtype=torch.int64))


def everything(source, **options):
    found = [b for b in batches(source, 5, **options)]
    return torch.cat([b.images for b in found]), [i for b in found for i in b.indices]


def test_folder_zip_npz_and_npy_give_the_same_images(make_folder, tmp_path):
    folder = make_folder("a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.name)
    stack = pictures(12)
    np.savez(tmp_path / "a.npz", stack)
    np.savez_compressed(tmp_path / "b.npz", arr_0=stack, arr_1=np.arange(12))
    np.save(tmp_path / "a.npy", stack.transpose(0, 3, 1, 2))
    for name in ("a", "a.zip", "a.npz", "b.npz", "a.npy"):
        images, indices = everything(open_images(tmp_path / name))
        assert indices == list(range(12))
        assert (images.permute(0, 2, 3, 1).numpy() == stack).all(), name
    assert open_images(tmp_path / "b.npz").labels.tolist() == list(range(12))


def test_parquet_datasets_bring_labels(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"bytes": encoded(Image.fromarray(p)), "path": None} for p in pictures(6)]
    table = pa.table({"img": rows, "label": [3, 1, 2, 0, 1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    source = open_images(tmp_path / "data.parquet")
    assert find_labels(source).tolist() == [3, 1, 2, 0, 1, 2]
    assert (everything(source)[0].permute(0, 2, 3, 1).numpy() == pictures(6)).all()
    table = table.set_column(1, "label", [list("abcabc")])
    pyarrow.parquet.write_table(table, tmp_path / "words.parquet")
    assert open_images(tmp_path / "words.parquet").labels is None
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="no image column"):
        open_images(tmp_path / "text.parquet")


def test_an_images_folder_stands_for_its_parent_and_other_files_are_counted(make_folder):
    folder = make_folder("a")
    Image.new("RGB", (4, 4)).save(folder / "grid.png")  # a contact sheet is no sample
    (folder / "images" / "note.txt").write_text("")
    source = open_images(folder)
    assert len(source) == 12 and source.ignored == 1


def test_bad_images_fail_or_are_skipped_up_to_one_in_a_hundred(make_folder):
    folder = make_folder("a")
    (folder / "images" / "000003.png").write_bytes(b"nonsense")
    for workers in (0, 2):
        with pytest.raises(ImageError, match=r"000003\.png"):
            everything(open_images(folder), workers=workers)
        skipped = []
        _, indices = everything(
            open_images(folder), on_error="skip", skipped=skipped, workers=workers
        )
        assert indices == [i for i in range(12) if i != 3] and "000003.png" in skipped[0]
    (folder / "images" / "000004.png").write_bytes(b"nonsense")
    with pytest.raises(ImageError, match="more than 1 %"):
        everything(open_images(folder), on_error="skip")


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_is_said_and_a_damaged_member_skipped(tmp_path, packing):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        for index, picture in enumerate(pictures(3)):
            archive.writestr(f"{index}.png", encoded(Image.fromarray(picture)))
        at = archive.infolist()[1].header_offset + 60
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes(20) + whole[at + 20 :])
    with pytest.raises(ImageError, match=r"1\.png of .*a\.zip"):
        everything(open_images(path))
    assert everything(open_images(path), on_error="skip")[1] == [0, 2]
    path.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"cannot read .*a\.zip"):
        open_images(path)


def test_arrays_of_another_range_name_the_image(tmp_path):
    values = np.zeros((3, 8, 8, 3), np.float32)
    values[2] = 7
    np.savez(tmp_path / "a.npz", values)
    with pytest.raises(ImageError, match=r"image 2 of .*\[0, 1\]"):
        everything(open_images(tmp_path / "a.npz"))


def test_images_of_several_sizes_stay_single(make_folder):
    folder = make_folder("a", count=3)
    Image.new("RGB", (20, 10)).save(folder / "images" / "wide.png")
    (batch,) = batches(open_images(folder), 8)
    assert [tuple(image.shape) for image in batch.images] == [(3, 16, 16)] * 3 + [(3, 10, 20)]


@pytest.mark.parametrize("name", ["nowhere", "missing.npz", "empty"])
def test_nothing_to_read_is_said(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        open_images(tmp_path / name)


def test_a_hub_dataset_without_the_split_asked_for_is_refused(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    parts = {"train": None, "test": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: parts)
    with pytest.raises(ValueError, match="no split 'tset', only train, test"):
        open_images("some/set@tset")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: open("/nowhere"))
    with pytest.raises(ValueError, match="no folder or file 'out/typo'"):
        open_images("out/typo")


def test_labels_from_run_json_folders_and_csv(make_folder, tmp_path):
    folder = make_folder("a", count=4)
    assert find_labels(open_images(folder)).tolist() == [0, 1, 2, 3]
    table = tmp_path / "labels.csv"
    table.write_text(
        "file,label\n" + "".join(f"00000{i}.png,{['cat', 'dog'][i % 2]}\n" for i in range(4))
    )
    assert find_labels(open_images(folder), str(table), class_names=("cat", "dog")).tolist() == [
        0,
        1,
        0,
        1,
    ]
    table.write_text(table.read_text(), encoding="utf-8-sig")  # as spreadsheets save it
    assert find_labels(open_images(folder), str(table), class_names=("cat", "dog"))[1] == 1
    table.write_bytes(b"\xff\xfe0")
    with pytest.raises(ValueError, match=r"cannot read labels from .*labels\.csv"):
        find_labels(open_images(folder), str(table))
    table.write_text("000000.png,0\n")
    with pytest.raises(ValueError, match=r"no label for .*000001\.png"):
        find_labels(open_images(folder), str(table))
    by_class = tmp_path / "classes"
    for name in ("dog", "cat"):
        (by_class / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(by_class / name / "1.png")
    assert find_labels(open_images(by_class), class_names=("cat", "dog")).tolist() == [0, 1]
    assert find_labels(open_images(by_class)) is None  # names of unknown classes: not guessed
    assert find_labels(open_images(by_class), "from-dirs").tolist() == [0, 1]
    table.write_text("x/1.png,0\ny/1.png,1\n")  # which of the two is meant is not guessed
    with pytest.raises(ValueError, match=r"no label for .*1\.png"):
        find_labels(open_images(by_class), str(table))
    (by_class / "cat" / "1.png").unlink()
    alone = open_images(by_class)  # samples of one known class have labels like any others
    assert find_labels(alone, class_names=("cat", "dog")).tolist() == [1]
    with pytest.raises(ValueError, match="no sub-folder for each class"):
        find_labels(alone, "from-dirs")
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        find_labels(open_images(folder))


def test_content_keys_know_bytes_and_shape_and_nothing_else():
    x = torch.from_numpy(pictures(40))
    keys = content_keys(x)
    assert len(set(keys.tolist())) == 40
    order = torch.randperm(40)
    assert torch.equal(content_keys(x[order]), keys[order])
    assert torch.equal(content_keys(list(x)), keys)
    assert int(content_keys(x[:1].reshape(1, 8, 32, 3))[0]) != int(keys[0])
    one_bit = x[:1].clone()
    one_bit[0, 5, 5, 1] ^= 1
    assert int(content_keys(one_bit)[0]) != int(keys[0])
