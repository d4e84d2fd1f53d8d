"""Files of weights are read in every format that sources write; what could run is refused, and does not run."""

import collections
import datetime
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sources.legacy_pickle import write_like_python_2
from torch import Tensor

from ws_algorithm import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -2.5])}


def assert_read(path: Path, expected: dict[str, Tensor] = WEIGHTS) -> None:
    read = read_checkpoint(path)
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_files_of_torch(tmp_path, wrapper, legacy):
    content: Any = {wrapper: WEIGHTS, "epoch": 3, "optimizer": {"state": {}}} if wrapper else WEIGHTS
    torch.save(content, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=not legacy)

    assert_read(tmp_path / "w.pth.tar")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_files_of_torch_with_more_than_torch_reads_safely(tmp_path, legacy):
    shared = torch.arange(10.0)
    weights = {
        "part": shared[2:8].reshape(2, 3),
        "turned": shared[:6].reshape(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.empty(0),
    }
    others = {
        "best": np.float64(0.5),
        "random": np.arange(4, dtype=np.uint32),
        "time": datetime.timedelta(seconds=3),
        "version": torch.__version__,
        "state": collections.defaultdict(dict, {0: {"step": 1}}),
        "names": {"a", "b"},
    }
    path = tmp_path / "w.pth"
    torch.save({"state_dict": weights, "meta": others}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)

    assert_read(path, {**weights, "parameter": torch.ones(2)})


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays(tmp_path, protocol):
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    arrays |= {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big": np.arange(3, dtype=">f4")}
    arrays |= {"number": np.float32(2.5), "none": np.empty((0, 3))}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"blobs": arrays, "cfg": "A: 1"}, protocol=protocol))

    expected = {**WEIGHTS, "fortran": torch.arange(6.0).double().reshape(2, 3), "big": torch.arange(3.0)}
    assert_read(tmp_path / "w.pkl", {**expected, "number": torch.tensor(2.5), "none": torch.empty(0, 3).double()})


def test_pickles_of_python_2(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    with open(tmp_path / "w.pkl", "wb") as file:
        write_like_python_2({**arrays, "weight_order": ["a"]}, file)

    assert_read(tmp_path / "w.pkl")


def test_files_of_numpy_and_safetensors(tmp_path):
    np.savez(tmp_path / "w.npz", **{name: tensor.numpy() for name, tensor in WEIGHTS.items()})  # pyright: ignore
    save_file(WEIGHTS, tmp_path / "w.safetensors")

    assert_read(tmp_path / "w.npz")
    assert read_checkpoint(tmp_path / "w.safetensors").keys() == WEIGHTS.keys()


class Evil:
    """Runs a function while it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def evil_things(target: Path) -> dict[str, Any]:
    object_dtype = np.dtype("O")
    inner = pickle.dumps(Evil(os.system, f"touch {target}"))
    return {
        "system": Evil(os.system, f"touch {target}"),
        "eval": Evil(eval, f"open({str(target)!r}, 'w')"),
        "numpy's load of a scalar": Evil(np.float64(1).__reduce__()[0], object_dtype, inner),
        "an array of objects": np.array([Evil(os.system, f"touch {target}")], dtype=object),
        "another codec": Evil(__import__("_codecs").encode, "x", "rot13"),
        "torch's load": Evil(torch.storage._load_from_bytes, inner),
        "getattr": Evil(getattr, "x", "upper"),
        "numpy's load": Evil(np.load, str(target)),
        "a class": Evil(collections.Counter, "ab"),
    }


REFUSED = {"system": "posix.system|nt.system", "eval": "builtins.eval", "getattr": "builtins.getattr"}
REFUSED |= {"torch's load": "torch.storage._load_from_bytes", "a class": "collections.Counter", "numpy's load": "numpy"}
REFUSED |= {"another codec": "rot13", "an array of objects": "'O8'", "numpy's load of a scalar": "'O8'"}


# torch, too, admits these two in its own files: neither can do harm
@pytest.mark.parametrize(
    "file, name",
    [("w.pkl", name) for name in REFUSED]
    + [(file, n) for file in ("w.pth", "legacy.pth") for n in REFUSED if n not in ("another codec", "a class")],
)
def test_what_could_run_is_refused_by_name_and_does_not_run(tmp_path, file, name):
    written, path = tmp_path / "written", tmp_path / file
    content = {"state_dict": {"a.weight": torch.ones(2)}, "x": evil_things(written)[name]}
    if file == "w.pkl":
        content["state_dict"] = {"a.weight": np.ones(2)}
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=file == "w.pth")

    with pytest.raises(ValueError, match=f"is refused: .*({REFUSED[name]})"):
        read_checkpoint(path)

    assert not written.exists()


def test_the_evil_ones_would_run_elsewhere(tmp_path):
    written = tmp_path / "written"
    pickle.loads(pickle.dumps(evil_things(written)["system"]))

    assert written.exists()


def test_an_array_of_objects_in_a_file_of_numpy_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([Evil(os.system, f"touch {tmp_path / 'written'}")], dtype=object))

    with pytest.raises(ValueError, match=r"is refused: it has an array of type '\|O'"):
        read_checkpoint(tmp_path / "w.npz")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("front", [b"", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."])
def test_a_tar_archive_is_refused_whatever_its_first_name(tmp_path, front):
    with tarfile.open(tmp_path / "w.pth.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin1") as archive:
        archive.addfile(tarfile.TarInfo((front or b"storages").decode("latin1")), io.BytesIO(b""))

    with pytest.raises(ValueError, match="is refused: it is a tar archive"):
        read_checkpoint(tmp_path / "w.pth.tar")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    torch.save({"a": torch.ones(4), "b": datetime.timedelta(1)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as whole, zipfile.ZipFile(tmp_path / "cut.pth", "w") as cut:
        for name in whole.namelist():
            cut.writestr(name, whole.read(name)[:8] if "/data/" in name else whole.read(name))

    with pytest.raises(ValueError, match="cut off"):
        read_checkpoint(tmp_path / "cut.pth")


@pytest.mark.parametrize("kind", ["text", "nothing", "half a zip", "half a legacy file", "half a pickle"])
def test_what_is_no_file_of_weights_is_refused(tmp_path, kind):
    path = tmp_path / "w.pth"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "half a zip")
    whole = pickle.dumps({"a": np.ones(50)}) if kind == "half a pickle" else path.read_bytes()
    path.write_bytes({"text": b"<html>404</html>", "nothing": b""}.get(kind, whole[: len(whole) // 2]))

    with pytest.raises(ValueError, match=r"`path` \(='.*w.pth'\) must be a file of weights.*or cut off"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content, named",
    [([1, 2], "holds a list"), ({"epoch": 3, "a": torch.ones(1)}, "'epoch' are no tensors"), ({}, "alone or under")],
)
def test_content_without_weights_is_refused(tmp_path, content, named):
    torch.save(content, tmp_path / "w.pth")

    with pytest.raises(ValueError, match=named):
        read_checkpoint(tmp_path / "w.pth")


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"`path` \(='nowhere.pth'\) must be a file, and there is none"):
        read_checkpoint("nowhere.pth")


def test_a_converted_file_is_not_converted_again(tmp_path):
    torch.save({"state_dict": WEIGHTS, "ws_algorithm": {"source": "detectron"}}, tmp_path / "w.pth")

    with pytest.raises(ValueError, match="is converted already: give it to a recipe as `model.pretrained`"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("ours", [False, True])
def test_the_run_of_another_formula_is_refused_and_that_of_composer_read(tmp_path, ours):
    says = "WeightStandardization(layers='all', formula='paper')" if ours else "WeightStandardization(0)"
    state = {"model": WEIGHTS, "algorithms": [("WeightStandardization", {"repr": says})]}
    torch.save({"state": state, "rng": [np.arange(3)]}, tmp_path / "w.pt")

    if not ours:
        assert_read(tmp_path / "w.pt")
        return
    with pytest.raises(ValueError, match="is of a run of this package.*`ws-algorithm export`"):
        read_checkpoint(tmp_path / "w.pt")
