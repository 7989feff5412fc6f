"""The image sets of the experiments: scikit-learn's digits, MNIST and CIFAR-10."""

from __future__ import annotations

import gzip
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.papers.report import Failure
from neuromod_ext import continual

Name = Literal["digits", "mnist", "cifar10"]
Array = np.ndarray[Any, Any]
Arrays = tuple[Array, ...]  # x_train, y_train, x_test, y_test

SHAPES = {"mnist": (28, 28), "cifar10": (32, 32, 3)}
OPENML = {"mnist": ("mnist_784", 60_000), "cifar10": ("CIFAR_10", 50_000)}
NPZ = ("x_train", "y_train", "x_test", "y_test")
IDX = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
BATCHES = "cifar-10-batches-py"
FORMATS = {
    "mnist": f"mnist.npz ({', '.join(NPZ)}) or the IDX files {IDX[0]}[.gz], …",
    "cifar10": f"cifar10.npz ({', '.join(NPZ)}) or the folder {BATCHES}",
}


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        x: [N, C, H, W], float32 in [0, 1].
        y: [N], int64, 0 to 9.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor | slice) -> Images:
        """The images at these positions."""
        return Images(self.x[index], self.y[index])


@dataclass(frozen=True)
class ImageSet:
    """One data set, with a test set of its own or (``test`` is None) one to be split off."""

    train: Images
    test: Images | None

    def split(self, seed: int, most: int | None = None) -> tuple[Images, Images]:
        """Training and test images of one seed.

        Args:
            seed: Picks the images of both; a quarter is for the test if the set has no own.
            most: At most so many training images.
        """
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        test = self.test
        if test is None:
            quarter = len(order) // 4
            test, order = self.train.take(order[:quarter]), order[quarter:]
        return self.train.take(order[:most]), test


def load(name: Name, folder: Path | None = None) -> ImageSet:
    """Load a data set.

    Args:
        name: Which one.
        folder: Where its files are; None downloads it from OpenML (the digits are in scikit-learn).

    Raises:
        Failure: There is no such file, or it does not hold what it should.
    """
    if name == "digits":
        if folder is not None:
            raise Failure("--data-dir: expected none with --data digits, which scikit-learn brings")
        return _digits()
    x_train, y_train, x_test, y_test = _checked(
        name, _download(name) if folder is None else _read(name, folder)
    )
    return ImageSet(_images(x_train, y_train), _images(x_test, y_test))


def rotate(x: Tensor, degrees: Tensor | float) -> Tensor:
    """Rotate images counterclockwise, each by its own angle.

    Bilinear, with zeros around. What lies outside the inscribed circle is set to zero at every
    angle, 0 included: otherwise the corners would tell the angle.

    Args:
        x: [N, C, H, W], H = W.
        degrees: [N], or one angle for all.
    """
    from_middle = (2 * torch.arange(x.shape[-1]) + 1) / x.shape[-1] - 1
    inside = from_middle.square() + from_middle.square().unsqueeze(1) < 1 + 1e-6
    return continual.rotate(x, degrees) * inside.to(x.device)


class Inputs(NamedTuple):
    """Images as models get them: rotated, then standardised by channel."""

    mean: Tensor
    std: Tensor

    @classmethod
    def like(cls, images: Images) -> Inputs:
        """With the mean and the deviation of these images."""
        std, mean = torch.std_mean(images.x, (0, 2, 3), keepdim=True)
        return cls(mean, std)

    def __call__(self, x: Tensor, degrees: Tensor | float) -> Tensor:
        """Rotate and standardise x, [B, C, H, W], by [B] angles or by one."""
        return (rotate(x, degrees) - self.mean) / self.std


def _images(x: Array, y: Array, white: float = 255) -> Images:
    pixels = torch.from_numpy(np.divide(x, white, dtype=np.float32))
    channels_first = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return Images(channels_first.contiguous(), torch.from_numpy(np.array(y)).long())


def _digits() -> ImageSet:
    """1797 images of 8 x 8, in a frame of 12 x 12 in which they can turn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = _images(digits.images, digits.target, white=16)
    return ImageSet(Images(F.pad(images.x, (2, 2, 2, 2)), images.y), None)


def _download(name: Name) -> Arrays:
    from sklearn.datasets import fetch_openml

    title, split = OPENML[name]
    try:
        with warnings.catch_warnings():  # of each retry; the error says enough
            warnings.simplefilter("ignore")
            x, y = fetch_openml(title, version=1, return_X_y=True, as_frame=False)
    except (OSError, ValueError) as error:
        raise Failure(
            f"{name}: expected to download {title} from openml.org, got {error}; "
            f"pass --data-dir with {FORMATS[name]}"
        ) from error
    x, y = x.astype(np.uint8), y.astype(np.uint8)
    x = _channels_last(x) if name == "cifar10" else x.reshape(-1, 28, 28)
    return x[:split], y[:split], x[split:], y[split:]


def _read(name: Name, folder: Path) -> Arrays:
    """Read the first of the known files that the folder has."""
    for file, read in _READERS[name].items():
        if (folder / file).exists():
            try:
                return read(folder / file)
            except Exception as error:  # there is no end to how a file can be broken
                raise Failure(
                    f"{name}: expected {FORMATS[name]} in {folder}, "
                    f"got {file}, and {type(error).__name__}: {error}; fetch it anew"
                ) from error
    got = "no such folder"
    if folder.is_dir():
        got = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "an empty folder"
    raise Failure(
        f"{name}: expected {FORMATS[name]} in {folder}, got {got}; "
        "put the files there, or leave --data-dir out to download them"
    )


def _npz(path: Path) -> Arrays:
    with np.load(path) as archive:
        return tuple(archive[key] for key in NPZ)


def _idx(path: Path) -> Arrays:
    """LeCun's format: two zeros, type 8, the number of sizes, big-endian sizes, bytes."""

    def read(name: str) -> Array:
        packed = path.with_name(f"{name}.gz")
        content = (
            gzip.decompress(packed.read_bytes())
            if packed.exists()
            else path.with_name(name).read_bytes()
        )
        if content[:3] != b"\0\0\x08":
            raise ValueError(f"{name} begins with {content[:4]!r}, which is no IDX header")
        sizes = np.frombuffer(content, ">i4", content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + sizes.nbytes).reshape(sizes)

    return tuple(read(name) for name in IDX)


class _ArraysOnly(pickle.Unpickler):
    """A pickle may run any code; that of CIFAR-10 needs these names only."""

    allowed = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self.allowed and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} in it, which is no array")


def _batches(path: Path) -> Arrays:
    """CIFAR-10's own pickles."""
    folder = path if path.is_dir() else path.parent

    def read(*names: str) -> Arrays:
        contents = []
        for name in names:
            with (folder / name).open("rb") as file:
                contents.append(_ArraysOnly(file, encoding="bytes").load())
        x = np.concatenate([content[b"data"] for content in contents])
        return _channels_last(x), np.concatenate([content[b"labels"] for content in contents])

    return (*read(*(f"data_batch_{i}" for i in range(1, 6))), *read("test_batch"))


def _channels_last(x: Array) -> Array:
    """Rows of CIFAR-10 are planes of red, green and blue, 1024 bytes each."""
    return x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


_READERS: dict[str, dict[str, Callable[[Path], Arrays]]] = {
    "mnist": {"mnist.npz": _npz, IDX[0]: _idx, f"{IDX[0]}.gz": _idx},
    "cifar10": {"cifar10.npz": _npz, BATCHES: _batches, "data_batch_1": _batches},
}


def _checked(name: Name, arrays: Arrays) -> Arrays:
    """Refuse arrays that are no images and labels of this set."""
    for part, x, y in zip(("train", "test"), arrays[::2], arrays[1::2], strict=True):
        if x.shape[1:] != SHAPES[name] or x.dtype != np.uint8 or len(x) == 0:
            shape = ", ".join(map(str, SHAPES[name]))
            raise Failure(
                f"{name}: expected x_{part} of shape [N, {shape}] and dtype uint8, "
                f"got {list(x.shape)} and {x.dtype}; see --help for the formats"
            )
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0 or y.max() > 9:
            raise Failure(
                f"{name}: expected y_{part} of {len(x)} labels from 0 to 9, "
                f"got {list(y.shape)} and {y.dtype}; see --help for the formats"
            )
    return arrays
