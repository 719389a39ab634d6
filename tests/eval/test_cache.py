"""Features on disk: found again, never stale, extracted by one process at a time."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from eval_samples import tensors, tiny_extractor
from PIL import Image

from diffsteer.eval import Reading
from diffsteer.eval.cache import FeatureCache
from diffsteer.eval.features import COLUMNS, extract
from diffsteer.eval.images import open_images
from diffsteer.eval.reading import read_features


@pytest.fixture
def stored():
    return extract(tensors(9), [tiny_extractor()], labels=torch.arange(9), prompts=["p"] * 9)


def test_everything_comes_back(stored, tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put("key", stored, {"notes": {"grey": 2}})
    found, note = cache.get("key")
    assert note == {"notes": {"grey": 2}} and found.taps.keys() == stored.taps.keys()
    for name in COLUMNS:
        assert torch.equal(getattr(found, name), getattr(stored, name)), name
    assert cache.get("other") is None
    (tmp_path / "key.npz").write_bytes(b"half a file")
    assert cache.get("key") is None


def test_the_least_recently_used_goes_first(stored, tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put("a", stored, {})
    size = (tmp_path / "a.npz").stat().st_size
    cache.limit = int(2.5 * size)
    cache.put("b", stored, {})
    os.utime(tmp_path / "a.npz", (1, 1))
    os.utime(tmp_path / "b.npz", (2, 2))
    assert cache.get("a") is not None  # used now
    cache.put("c", stored, {})
    assert {path.stem for path in tmp_path.glob("*.npz")} == {"a", "c"}


def same_size_and_date(path, colour):
    """Another picture with the size and date of the one at ``path``."""
    stat = path.stat()
    Image.new("RGB", (16, 16), colour).save(path, compress_level=0)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("verify", [False, True])
def test_bytes_are_compared_where_dates_are_not_trusted(make_folder, tmp_path, verify):
    folder = make_folder("a", 6)
    for path in (folder / "images").iterdir():
        Image.new("RGB", (16, 16), (9, 9, 9)).save(path, compress_level=0)
    cache, net = FeatureCache(tmp_path / "cache", verify=verify), tiny_extractor()

    def read():
        return read_features(open_images(folder), [net], Reading(workers=0), cache=cache)

    first = read()
    assert not first.cached and read().cached
    same_size_and_date(folder / "images" / "000003.png", (200, 9, 9))
    again = read()
    assert again.cached is not verify
    changed = not torch.equal(again.features.colour, first.features.colour)
    assert changed is verify


def test_one_extracts_and_the_other_waits_and_finds_it(make_folder, tmp_path):
    folder, net = make_folder("a", 6), tiny_extractor()
    running, most, guard = [0], [0], threading.Lock()

    class Slow:
        id, space = net.id, net.space

        def __call__(self, images):
            with guard:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.2)
            running[0] -= 1
            return net(images)

    cache, found = FeatureCache(tmp_path / "cache"), []
    both = [
        threading.Thread(
            target=lambda: found.append(
                read_features(open_images(folder), [Slow()], Reading(workers=0), cache=cache)
            )
        )
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert most == [1] and sorted(read.cached for read in found) == [False, True]
    assert torch.equal(found[0].features.keys, found[1].features.keys)
    assert not list((tmp_path / "cache").glob(".*"))


def test_only_one_at_a_time_is_inside_though_each_removes_the_lock(tmp_path):
    inside, most = [], []

    def visit(number):
        with FeatureCache(tmp_path).lock("key"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.005)
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(40)))
    assert max(most) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"alpha": "error"}, {"on_error": "skip"}, {"num": 5}, {"prompts": ["q"] * 6}, {"scorer": "b"}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_features_is_part_of_their_key(make_folder, tmp_path, change):
    source, net = open_images(make_folder("a", 6)), tiny_extractor()

    def read(*, prompts=("p",) * 6, scorer="a", **options):
        def score(images, prompts):
            return torch.zeros(len(images))

        score.id = scorer
        return read_features(
            source, [net], Reading(workers=0, **options), cache=FeatureCache(tmp_path / "cache"),
            prompts=prompts, scorers={"s": score},
        )  # fmt: skip

    base = {"prompts": None} if "num" in change else {}  # prompts would tell the images too
    read(**base)
    assert read(**base).cached and not read(**base, **change).cached
    assert read(**base, **change).cached


def test_a_key_holds_every_part_and_where_it_ends():
    plain = FeatureCache.key("files", "net", [1, 2], "fail")
    assert plain == FeatureCache.key("files", "net", [1, 2], "fail")
    others = [("filesn", "et", [1, 2], "fail"), ("files", "net2", [1, 2], "fail"),
              ("files", "net", [12], "fail"), ("files", "net", [1, 2], "skip")]  # fmt: skip
    assert len({plain, *(FeatureCache.key(*other) for other in others)}) == 5


def test_a_file_of_the_same_size_and_another_date_is_another_file(make_folder):
    folder = make_folder("fake", 3)
    before = open_images(folder).fingerprint
    assert open_images(folder).fingerprint == before
    image = folder / "images" / "000001.png"
    os.utime(image, ns=(image.stat().st_atime_ns, image.stat().st_mtime_ns + 1000))
    assert open_images(folder).fingerprint != before
