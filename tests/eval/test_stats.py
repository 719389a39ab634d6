"""Statistics of ours and of the peers: round trips, checks, and no code from a pickle."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffsteer.eval import Moments, Statistics, read_statistics, write_statistics
from diffsteer.eval.pickles import UnsafePickle, read_numbers


@pytest.fixture
def rows():
    random = torch.Generator().manual_seed(3)
    return torch.randn(50, 7, generator=random) + 2


@pytest.fixture
def made(rows):
    return Statistics.of_moments(
        Moments.of(rows), extractor="net@1/x", features=rows[:20], labels=torch.arange(20) % 4,
        spatial=(torch.zeros(3).double(), torch.eye(3).double()), header={"data": "toy"},
    )  # fmt: skip


def test_our_file_round_trips_and_does_not_overwrite(made, tmp_path):
    path = tmp_path / "deep" / "ref.npz"
    write_statistics(path, made)
    found = read_statistics(path)
    assert torch.equal(found.mean, made.mean) and torch.equal(found.covariance, made.covariance)
    assert (found.count, found.extractor, found.header["data"]) == (50, "net@1/x", "toy")
    torch.testing.assert_close(found.features, made.features, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.labels, made.labels)
    assert torch.equal(found.spatial[1], made.spatial[1])
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_statistics(path, made)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["ref.npz"]
    with np.load(path) as peer:  # what pytorch-fid and clean-fid look for
        assert {"mu", "sigma"} <= set(peer)


def test_labels_of_many_classes_are_kept(made, tmp_path):
    write_statistics(tmp_path / "ref.npz", replace(made, labels=torch.arange(20) + 40_000))
    assert read_statistics(tmp_path / "ref.npz").labels.tolist()[-1] == 40_019


def test_a_failed_write_leaves_what_was_there(made, tmp_path, monkeypatch):
    path = tmp_path / "ref.npz"
    path.write_bytes(b"precious")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        write_statistics(path, made, overwrite=True)
    assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == ["ref.npz"]


def peer_files(folder, mean, cov, rows):
    np.savez(folder / "edm.npz", mu=mean, sigma=cov)
    np.savez(folder / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=mean, sigma=cov,
             mu_s=mean[:3], sigma_s=cov[:3, :3])  # fmt: skip
    np.savez_compressed(folder / "clean.npz", mu=mean, sigma=cov)
    np.savez(folder / "dgm.npz", reps=rows, model=np.array("inception"))
    both = {"fid": {"mu": mean, "sigma": cov}, "fd_dinov2": {"mu": mean + 1, "sigma": cov}}
    (folder / "edm2.pkl").write_bytes(pickle.dumps({"num_images": 50, **both}))
    (folder / "flat.pkl").write_bytes(pickle.dumps({"mu": mean, "sigma": cov}))
    torch.save({"mu": mean, "sigma": cov}, folder / "fidelity.pt")


@pytest.mark.parametrize(
    "name", ["edm.npz", "adm.npz", "clean.npz", "dgm.npz", "edm2.pkl", "flat.pkl", "fidelity.pt"]
)
def test_statistics_of_the_peers(rows, tmp_path, name):
    sums = Moments.of(rows)
    peer_files(tmp_path, sums.mean.numpy(), sums.covariance.numpy(), rows.numpy())
    found = read_statistics(tmp_path / name, space="fid")
    torch.testing.assert_close(found.mean, sums.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance, sums.covariance, rtol=1e-12, atol=1e-12)
    assert found.extractor is None
    assert (found.spatial is not None) == (name == "adm.npz")
    if name == "edm2.pkl":
        assert found.count == 50
        other = read_statistics(tmp_path / name, space="fd_dinov2")
        torch.testing.assert_close(other.mean, sums.mean + 1)
        with pytest.raises(ValueError, match="say which one"):
            read_statistics(tmp_path / name)


def test_old_numpy_module_names_are_read(tmp_path):
    old = pickle.dumps({"mu": np.arange(3.0), "sigma": np.eye(3)}, protocol=2)
    old = old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "old.pkl").write_bytes(old)
    assert read_statistics(tmp_path / "old.pkl").mean.tolist() == [0, 1, 2]


class Malicious:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
def test_a_pickle_runs_nothing(tmp_path, suffix):
    flag, path = tmp_path / "was-here", tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps({"mu": Malicious(flag)}))
    with pytest.raises(ValueError):
        read_statistics(path)
    assert not flag.exists()
    if suffix == ".pkl":
        with pytest.raises(UnsafePickle, match=r"posix\.mkdir|nt\.mkdir"):
            read_numbers(path)


def test_an_npz_of_objects_runs_nothing(tmp_path):
    flag = tmp_path / "was-here"
    evil = np.empty(1, object)
    evil[0] = Malicious(flag)
    np.savez(tmp_path / "evil.npz", mu=evil, sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"objects|pickle"):
        read_statistics(tmp_path / "evil.npz")
    assert not flag.exists()


@pytest.mark.parametrize(
    "mean, cov, message",
    [
        (np.zeros(3), np.full((3, 3), np.nan), "NaN"),
        (np.zeros(2), np.eye(3), "shape"),
        (np.zeros(3), np.eye(3) + np.triu(np.ones((3, 3)), 1), "symmetric"),
        (np.zeros(3), np.diag([1.0, 1.0, -0.5]), "eigenvalue"),
    ],
)
def test_corrupt_statistics_are_named(tmp_path, mean, cov, message):
    np.savez(tmp_path / "bad.npz", mu=mean, sigma=cov)
    with pytest.raises(ValueError, match=rf"bad\.npz(.|\n)*{message}"):
        read_statistics(tmp_path / "bad.npz")


@pytest.mark.parametrize("name, data", [("a.npz", b"zip?"), ("a.pkl", b"pickle?"), ("a.txt", b"")])
def test_unreadable_files_are_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        read_statistics(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        read_statistics(tmp_path / f"missing-{name}")
