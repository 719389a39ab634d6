"""Reading labelled images, and the order they are drawn in."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from diffsteer.training import LabelledImages, load_images
from diffsteer.training.data import EpochOrder, StoredImages, derive_seed


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png_bytes(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()


def write_parquet(path, images, *, image="img", label="label", features=True, change=None):
    """The images as a parquet file in the hub's layout, with these column names."""
    import datasets

    rows = {
        image: [{"bytes": png_bytes(pixels), "path": None} for pixels in images.pixels],
        label: images.labels.tolist(),
    }
    (change or (lambda rows: None))(rows)
    kinds = {image: datasets.Image(), label: datasets.ClassLabel(names=list(images.names))}
    table = datasets.Dataset.from_dict(rows, datasets.Features(kinds) if features else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    return path


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["img", "image"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_parquet_comes_back_pixel_for_pixel(tmp_path, images, image, what):
    path = write_parquet(tmp_path / "data" / "train.parquet", images, image=image)
    read = load_images(str(path if what == "file" else path.parent), resolution=8)
    assert isinstance(read, LabelledImages)
    assert torch.equal(read.pixels, images.pixels) and torch.equal(read.labels, images.labels)
    assert read.names == images.names and read.digest() == images.digest()


def test_parquet_without_the_hubs_notes_is_read_too(tmp_path, images):
    path = write_parquet(tmp_path / "plain.parquet", images, features=False)
    read = load_images(str(path), resolution=8)
    assert torch.equal(read.pixels, images.pixels) and read.names == ("0", "1", "2")


def test_splits_of_a_folder_are_told_apart(tmp_path, images):
    few = LabelledImages(images.pixels[:5], images.labels[:5], images.names)
    write_parquet(tmp_path / "data" / "train.parquet", images)
    write_parquet(tmp_path / "data" / "test.parquet", few)
    assert len(load_images(str(tmp_path / "data"), resolution=8)) == len(images)
    assert len(load_images(str(tmp_path / "data"), split="test", resolution=8)) == 5
    with pytest.raises(ValueError, match="split 'validation'"):
        load_images(str(tmp_path / "data"), split="validation", resolution=8)


def test_class_folders_are_labels_and_pictures_are_cropped_and_resized(tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "data" / name).mkdir(parents=True)
        wide = Image.new("RGB", (40, 16), (0, 255, 0))  # a green margin left and right is cut off
        wide.paste(colour, (12, 0, 28, 16))
        wide.save(tmp_path / "data" / name / "1.png")
    read = load_images(str(tmp_path / "data"), resolution=8)
    assert read.names == ("blue", "red")
    assert read.pixels[read.labels == 1].unique(dim=0).shape == (1, 3, 8, 8)
    assert read.pixels[read.labels == 1][0].flatten(1).tolist() == [[255] * 64, [0] * 64, [0] * 64]
    assert read.pixels[read.labels == 0][0, 2].min() == 255


def test_what_does_not_fit_into_memory_is_decoded_when_drawn(tmp_path, images):
    path = write_parquet(tmp_path / "train.parquet", images)
    stored = load_images(str(path), resolution=8, memory=100)
    assert isinstance(stored, StoredImages) and len(stored) == len(images)
    indices, flip = torch.tensor([7, 0, 7]), torch.tensor([False, True, True])
    for mine, known in zip(stored.take(indices, flip), images.take(indices, flip), strict=True):
        assert torch.equal(mine, known)
    assert stored.digest() == load_images(str(path), resolution=8, memory=100).digest()


def test_inputs_are_in_minus_one_to_one_and_mirrored_on_request(images):
    flip = torch.tensor([True, False])
    pixels, labels = images.take(torch.tensor([3, 4]), flip)
    assert torch.equal(labels, images.labels[3:5])
    back = ((pixels + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back[0], images.pixels[3].flip(-1)) and torch.equal(
        back[1], images.pixels[4]
    )
    edges = LabelledImages(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), labels, ())
    assert edges.take(torch.arange(2), flip)[0].flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("column", ["image", "label"])
def test_wrong_columns_are_named(tmp_path, images, column):
    path = write_parquet(tmp_path / "train.parquet", images, **{column: "other"})
    with pytest.raises(ValueError, match=r"'img' or 'image', and 'label'.*found \[.*'other'"):
        load_images(str(path), resolution=8)


def test_a_path_that_is_not_there_is_no_hub_name(tmp_path):
    for source in (str(tmp_path / "nothing"), "./nothing", "~/nothing-here"):
        with pytest.raises(FileNotFoundError, match=r"does not exist; give a parquet file.*hub"):
            load_images(source)


def test_a_hub_name_offline_says_so(monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise OSError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"'nobody/nothing'.*check the name.*the network"):
        load_images("nobody/nothing")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .* as parquet or as class folders"):
        load_images(str(tmp_path / "data"))


def test_a_broken_image_and_a_missing_label_are_named(tmp_path, images):
    def break_image(rows):
        rows["img"][4] = {"bytes": b"no image", "path": None}

    def drop_label(rows):
        rows["label"][5] = None

    path = write_parquet(tmp_path / "a.parquet", images, change=break_image)
    with pytest.raises(ValueError, match=r"image 4 of .* cannot be decoded"):
        load_images(str(path), resolution=8)
    path = write_parquet(tmp_path / "b.parquet", images, change=drop_label)
    with pytest.raises(ValueError, match=r"image 5 of .* has the label None, expected 0 to 2"):
        load_images(str(path), resolution=8)


def test_a_change_of_one_pixel_or_label_changes_the_digest(images):
    pixels, labels = images.pixels.clone(), images.labels.clone()
    pixels[3, 1, 2, 2] ^= 1
    labels[3] = 0 if labels[3] else 1
    digests = {
        LabelledImages(p, y, images.names).digest()
        for p in (images.pixels, pixels)
        for y in (images.labels, labels)
    }
    assert len(digests) == 4


# -- order ---------------------------------------------------------------------------------------


def test_every_epoch_is_a_fresh_permutation():
    order = EpochOrder(50, seed=1)
    epochs = [order.epoch(index) for index in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(50))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], EpochOrder(50, seed=2).epoch(0))


@pytest.mark.parametrize("start, length", [(0, 7), (45, 10), (98, 120), (500, 1), (3, 0)])
def test_any_stretch_is_that_part_of_the_whole_order(start, length):
    whole = torch.cat([EpochOrder(50, seed=1).epoch(index) for index in range(11)])
    assert torch.equal(EpochOrder(50, seed=1).stretch(start, length), whole[start : start + length])


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="no images"):
        EpochOrder(0, seed=0)


def test_seeds_differ_with_every_part_and_in_its_place():
    parts = [(0, "a", 1), (0, "b", 1), (1, "a", 0), (0, "a", 11), (0, "a1", 1), (0, "a")]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
