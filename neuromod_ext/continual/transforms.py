"""What tasks do to images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Transform = Callable[[Tensor], Tensor]


def rotate(images: Tensor, degrees: Tensor | float) -> Tensor:
    """Rotate images counterclockwise about their middle, bilinear, with zeros around.

    Args:
        images: [N, C, H, W], H = W, floating.
        degrees: [N], or one angle for all.

    Returns:
        Like ``images``; a quarter turn is exact.

    Raises:
        ValueError: The images are not square.
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"rotate: expected images of shape [N, C, H, W] with H = W, got {list(images.shape)}"
        )
    angle = torch.as_tensor(degrees, dtype=torch.float64).expand(len(images)).deg2rad()
    # Rounded, so that quarter turns map pixels to pixels.
    cos, sin = angle.cos().round(decimals=12), angle.sin().round(decimals=12)
    matrix = torch.stack((cos, -sin, sin, cos), -1).view(-1, 2, 2)
    matrix = F.pad(matrix, (0, 1)).to(images)  # no translation
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def augmentations(size: tuple[int, int]) -> dict[str, Transform]:
    """The eight tasks of AugmentMNIST, by name, from kornia.

    Args:
        size: Height and width of the images.

    Returns:
        T1 to T8. Some draw numbers from torch's global generator.

    Raises:
        ImportError: There is no kornia.

    Source: Hong and Pavlic, "Randomly Weighted Neuromodulation in Neural Networks Facilitates
    Learning of Manifolds Common Across Tasks", table 1. It names torchvision's transforms; kornia's
    of the same names and settings differ in what both leave open, such as how a border is padded.
    """
    try:
        from kornia import augmentation as k
    except ImportError as error:
        raise ImportError(
            "AugmentMNIST: expected kornia, got none; pip install neuromod_ext[augment]"
        ) from error
    return {
        "original": lambda images: images,
        "horizontal flip": k.RandomHorizontalFlip(p=1.0),
        "vertical flip": k.RandomVerticalFlip(p=1.0),
        "blur": k.RandomGaussianBlur((5, 5), (2.0, 2.0), p=1.0),
        "perspective": k.RandomPerspective(0.5, p=1.0),
        "erasing": k.RandomErasing(p=1.0),
        "invert": k.RandomInvert(p=1.0),
        "resized crop": k.RandomResizedCrop(size),
    }
