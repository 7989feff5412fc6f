"""Streams of tasks, the protocol that learns them, and its measures."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from neuromod_ext import continual
from neuromod_ext.continual import TaskStream

MEAN, STD = 0.1307, 0.3081
STREAMS: dict[str, Callable[..., TaskStream]] = {
    "rotation": continual.RotationMNIST,
    "shift": continual.ShiftMNIST,
    "augment": continual.AugmentMNIST,
    "permuted": continual.PermutedMNIST,
    "split": continual.SplitMNIST,
}


def images(n: int = 20, side: int = 12, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, 1, side, side, generator=generator), torch.arange(n) % classes


def stream(name: str, *args: Any, **options: Any) -> TaskStream:
    if name == "augment":
        pytest.importorskip("kornia")
    return STREAMS[name](*(args or images()), **options)


def pixels(task: continual.Task) -> Tensor:
    """A task's inputs before they were normalised."""
    return task.inputs * STD + MEAN


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_a_sequence_of_data_sets(name: str) -> None:
    tasks = stream(name)
    assert len(list(tasks)) == len(tasks) == len(tasks.names)
    assert [task.name for task in tasks] == list(tasks.names)
    assert torch.equal(tasks[-1].inputs, tasks[len(tasks) - 1].inputs)
    assert [task.name for task in tasks[1:3]] == list(tasks.names[1:3])
    with pytest.raises(IndexError):
        tasks[len(tasks)]
    for task in tasks:
        assert task.inputs.shape[1:] == (1, 12, 12)
        assert len(task) == len(task.inputs) == len(task.labels)


def test_take() -> None:
    tasks = stream("shift")
    first = tasks.take(3)
    assert [task.name for task in first] == ["0 px", "1 px", "2 px"]
    assert (first.closed, tasks.closed, tasks.take(99).closed) == (False, True, True)
    assert len(tasks) == len(tasks.take(99)) == 12
    with pytest.raises(ValueError, match=r"ShiftMNIST\.take: expected count of at least 1, got 0"):
        tasks.take(0)


@pytest.mark.parametrize("name", STREAMS)
def test_a_task_goes_into_a_data_loader(name: str) -> None:
    task = stream(name)[1]
    x, y = task[0]
    assert x.shape == (1, 12, 12)
    assert y.shape == ()
    fast = BatchSampler(RandomSampler(task), 3, drop_last=False)
    for loader in (
        DataLoader(task, 3, shuffle=True),
        DataLoader(task, sampler=fast, batch_size=None),
    ):
        batches = list(loader)
        assert batches[0][0].shape == (3, 1, 12, 12)
        labels = torch.cat([y for _, y in batches])
        assert labels.dtype == torch.int64
        assert torch.equal(labels.sort().values, task.labels.sort().values)
        inputs = torch.cat([x for x, _ in batches])
        torch.testing.assert_close(inputs.sum(), task.inputs.sum())


def test_the_first_task_is_the_original_normalised() -> None:
    x, y = images()
    for name in ("rotation", "shift", "augment", "permuted"):
        task = stream(name)[0]
        torch.testing.assert_close(task.inputs, (x - MEAN) / STD)
        assert torch.equal(task.labels, y)


def test_images_may_be_bytes_without_channels() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.uint8).view(2, 4, 4)
    task = continual.ShiftMNIST(x, torch.tensor([1, 0]), mean=0.5, std=2)[0]
    torch.testing.assert_close(task.inputs, (x.unsqueeze(1) / 255 - 0.5) / 2)


def test_rotation_turns_counterclockwise() -> None:
    tasks = stream("rotation")
    assert (len(tasks), tasks.closed, tasks.names[35]) == (36, True, "350°")
    for quarter in range(4):
        expected = torch.rot90(images()[0], quarter, (2, 3))
        torch.testing.assert_close(pixels(tasks[9 * quarter]), expected, rtol=0, atol=2e-5)
    ten = continual.rotate(images()[0], 10.0)
    torch.testing.assert_close(pixels(tasks[1]), ten, rtol=0, atol=1e-6)
    assert not stream("rotation", tasks=5).closed


def test_rotate_moves_what_it_should() -> None:
    # A blob, 6 pixels right of the middle; 30 degrees counterclockwise, rows counted downwards.
    row, column = torch.meshgrid(torch.arange(31.0) - 15, torch.arange(31.0) - 15, indexing="ij")
    blob = torch.exp(-((column - 6) ** 2 + row**2) / 4)[None, None]
    for degrees in (30.0, 200.0):
        turned = continual.rotate(blob, degrees)[0, 0]
        x, y = ((turned * at).sum() / turned.sum() for at in (column, -row))
        assert x == pytest.approx(6 * math.cos(math.radians(degrees)), abs=0.05)
        assert y == pytest.approx(6 * math.sin(math.radians(degrees)), abs=0.05)


@pytest.mark.parametrize("step", [1, 2])
def test_shift_goes_right_and_comes_round(step: int) -> None:
    x, _ = images()
    tasks = stream("shift", pixels=step)
    assert (len(tasks), tasks.closed) == (12 // step, True)
    shifted = pixels(tasks[1])
    torch.testing.assert_close(shifted[..., step:], x[..., :-step], rtol=0, atol=1e-6)
    torch.testing.assert_close(shifted[..., :step], x[..., -step:], rtol=0, atol=1e-6)
    assert len(continual.ShiftMNIST(torch.rand(1, 28, 28), torch.zeros(1).long(), pixels=step)) == (
        28 // step
    )


def test_permuted_keeps_the_pixels_of_an_image() -> None:
    x, _ = images()
    tasks, again = stream("permuted", tasks=4), stream("permuted", tasks=4)
    other = stream("permuted", tasks=4, seed=1)
    for t in range(1, 4):
        torch.testing.assert_close(
            pixels(tasks[t]).flatten(1).sort().values, x.flatten(1).sort().values
        )
        assert torch.equal(tasks[t].inputs, again[t].inputs)
        assert not torch.equal(tasks[t].inputs, tasks[t - 1].inputs)
        assert not torch.equal(tasks[t].inputs, other[t].inputs)
    # One order for all images of a task: equal images stay equal.
    twice = continual.PermutedMNIST(x[[3, 3]], torch.zeros(2).long())[2].inputs
    assert torch.equal(*twice)


def test_split_has_its_own_classes() -> None:
    x, _ = images()
    tasks = stream("split")
    assert tasks.names == ("0/1", "2/3", "4/5", "6/7", "8/9")
    assert tasks[2].labels.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(pixels(tasks[2]), x[[4, 5, 14, 15]])
    assert stream("split", relabel=False)[2].labels.tolist() == [4, 5, 4, 5]
    assert len(stream("split", classes=5)) == 2


def test_augmentations_do_what_they_say() -> None:
    pytest.importorskip("kornia")
    x = torch.zeros(40, 1, 12, 12)
    x[:, :, 2:9, 3:6] = 1
    tasks = {task.name: pixels(task) for task in stream("augment", x, torch.zeros(40).long())}
    assert list(tasks) == [
        *("original", "horizontal flip", "vertical flip", "blur"),
        *("perspective", "erasing", "invert", "resized crop"),
    ]
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(tasks["horizontal flip"], x.flip(3), **close)
    torch.testing.assert_close(tasks["vertical flip"], x.flip(2), **close)
    torch.testing.assert_close(tasks["invert"], 1 - x, **close)
    kernel = torch.exp(-torch.arange(-2.0, 3).square() / 8)
    kernel = kernel.outer(kernel) / kernel.sum() ** 2
    blurred = nn.functional.conv2d(
        nn.functional.pad(x, (2, 2, 2, 2), mode="reflect"), kernel[None, None]
    )
    torch.testing.assert_close(tasks["blur"], blurred, rtol=0, atol=1e-5)
    assert ((tasks["erasing"] - x).abs().flatten(1).max(1).values < 1e-6).float().mean() < 1
    assert (tasks["erasing"] <= x + 1e-6).all()
    for drawn in ("erasing", "perspective", "resized crop"):
        assert len({tuple(image.flatten().tolist()) for image in tasks[drawn]}) > 10, drawn


def test_augmentations_repeat_and_leave_the_generator_alone() -> None:
    tasks = stream("augment")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = [task.inputs for task in tasks]
    assert torch.equal(torch.rand(2), expected)
    for t in reversed(range(8)):
        assert torch.equal(tasks[t].inputs, first[t])
    assert not torch.equal(stream("augment", seed=1)[5].inputs, first[5])


def test_augment_without_kornia_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ImportError, match=r"expected kornia, got none; pip install neuromod_ext\["):
        continual.AugmentMNIST(*images())


X, Y = images()
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: continual.ShiftMNIST(X.numpy(), Y), TypeError, "images to be a Tensor, got ndarray"),
    (lambda: continual.ShiftMNIST(X.long(), Y), TypeError, "dtype or uint8, got int64"),
    (lambda: continual.ShiftMNIST(X[0, 0], Y), ValueError, r"got \[12, 12\]"),
    (lambda: continual.ShiftMNIST(X[:0], Y[:0]), ValueError, r"got \[0, 1, 12, 12\]"),
    (lambda: continual.ShiftMNIST(X - 0.5, Y), ValueError, "streams normalise after"),
    (lambda: continual.ShiftMNIST(X * torch.nan, Y), ValueError, "from 0 to 1, got nan"),
    (lambda: continual.ShiftMNIST(X, Y.int()), TypeError, "int64, got int32"),
    (lambda: continual.ShiftMNIST(X, Y[:3]), ValueError, r"\[N\] = \[20\], got \[3\]"),
    (lambda: continual.ShiftMNIST(X, Y - 1), ValueError, "labels of at least 0, got -1"),
    (lambda: continual.ShiftMNIST(X, Y, std=0), ValueError, "std > 0, got 0.1307 and 0"),
    (lambda: continual.ShiftMNIST(X, Y, pixels=5), ValueError, "divide the width, 12, got 5"),
    (lambda: continual.ShiftMNIST(X, Y, pixels=0), ValueError, "divide the width, 12, got 0"),
    (lambda: continual.RotationMNIST(X[..., :8], Y), ValueError, "square images, got 12 x 8"),
    (lambda: continual.RotationMNIST(X, Y, tasks=0), ValueError, "tasks of at least 1, got 0"),
    (lambda: continual.PermutedMNIST(X, Y, tasks=0), ValueError, "tasks of at least 1, got 0"),
    (lambda: continual.SplitMNIST(X, Y, classes=3), ValueError, "their number, 10, got 3"),
    (lambda: continual.SplitMNIST(X[-1:], Y[-1:]), ValueError, "images of classes 0/1, got none"),
    (lambda: continual.rotate(X[0], 3.0), ValueError, r"H = W, got \[1, 12, 12\]"),
    (lambda: continual.forgetting([[1, 2]]), ValueError, r"shape \[T, T\], got \[1, 2\]"),
    (lambda: continual.forgetting([[1, 0], [np.nan, 1]]), ValueError, "at task 0 after task 1"),
    (lambda: continual.parameters_per_task(nn.Linear(1, 1), 0), ValueError, "at least 1, got 0"),
    (lambda: fitted(epochs=0), ValueError, "epochs of at least 1, got 0"),
    (lambda: fitted(batch_size=0), ValueError, "batch_size of at least 1, got 0"),
    (lambda: list(continual.learn_stream([], [TASK], id, id)), ValueError, "in train, 0, got 1"),
    (lambda: list(continual.learn_stream([], [], id, id, first=1)), ValueError, "0 to 0, got 1"),
    (lambda: continual.accuracy(id, continual.Task("a", X[:0], Y[:0])), ValueError, "task 'a'"),
]
TASK = continual.Task("a", X, Y)


def fitted(**options: Any) -> Any:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return continual.fit(model, TASK, optimizer, **{"epochs": 1, **options})


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_calls(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert ": expected " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_measures() -> None:
    nan = np.nan
    matrix = [[0.9, nan, nan], [0.5, 0.8, nan], [0.6, 0.85, 0.7]]
    assert continual.average_accuracy(matrix) == pytest.approx((0.6 + 0.85 + 0.7) / 3)
    # Task 0 fell from 0.9 to 0.6; task 1 rose from 0.8 to 0.85.
    assert continual.forgetting(matrix) == pytest.approx((0.3 - 0.05) / 2)
    filled = np.nan_to_num(np.array(matrix), nan=1.0)  # what is above the diagonal does not count
    assert continual.forgetting(filled) == continual.forgetting(matrix)
    assert continual.forgetting([[0.5]]) == 0
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)  # frozen, but still to be stored
    model.register_buffer("fixed", torch.zeros(100))
    assert continual.parameters_per_task(model, 4) == 2


def test_fit_is_gradient_descent() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    by_hand = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    by_hand.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[float] = []
    losses = continual.fit(
        model,
        TASK,
        optimizer,
        epochs=3,
        batch_size=8,
        generator=torch.Generator().manual_seed(4),
        after_epoch=seen.append,
    )
    assert seen == losses
    generator = torch.Generator().manual_seed(4)
    for epoch in range(3):
        total = 0.0
        for places in torch.randperm(20, generator=generator).split(8):
            loss = nn.functional.cross_entropy(by_hand(X[places]), Y[places])
            total += loss.item() * len(places) / 20
            gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
            with torch.no_grad():
                for p, g in zip(by_hand.parameters(), gradients, strict=True):
                    p -= 0.1 * g
        assert losses[epoch] == pytest.approx(total)
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict())


def test_learn_stream_fills_the_accuracy_matrix() -> None:
    """A memory that answers right where it was taught, except that every task spoils the first."""
    tasks = stream("shift")[:4]
    taught: list[int] = []

    def predict(task: int, inputs: Tensor) -> Tensor:
        right = nn.functional.one_hot(tasks[task].labels, 10)
        return right.roll(1, 1) if task == 0 and len(taught) > 1 else right

    calls: list[tuple[int, str]] = []

    def learn(task: int, data: continual.Task) -> None:
        taught.append(task)
        calls.append((task, data.name))

    rows = list(continual.learn_stream(tasks, tasks, learn, predict))
    assert rows == [[1], [0, 1], [0, 1, 1], [0, 1, 1, 1]]
    assert calls == [(t, f"{t} px") for t in range(4)]
    taught[:] = [0, 1]
    assert list(continual.learn_stream(tasks, tasks, learn, predict, first=2)) == rows[2:]
    assert taught == [0, 1, 2, 3]


def test_accuracy_counts() -> None:
    logits = nn.functional.one_hot(torch.where(torch.arange(20) < 15, Y, (Y + 1) % 10), 10)
    numbered = continual.Task("a", torch.arange(20).view(20, 1, 1, 1), Y)
    for batch_size in (1, 7, 100):
        found = continual.accuracy(lambda x: logits[x.flatten()], numbered, batch_size=batch_size)
        assert found == 0.75


def test_rows_of_a_stream_become_a_matrix() -> None:
    rows = [[0.9], [0.5, 0.8], [0.6, 0.85, 0.7]]
    matrix = continual.accuracy_matrix(iter(rows))
    assert np.isnan(matrix[np.triu_indices(3, 1)]).all()
    assert matrix[np.tril_indices(3)].tolist() == [0.9, 0.5, 0.8, 0.6, 0.85, 0.7]
    for rows, words in (([[0.9], [0.5]], "2 numbers in row 1, got 1"), ([], "got none")):
        with pytest.raises(ValueError, match=f"accuracy_matrix: expected .*{words}"):
            continual.accuracy_matrix(rows)
    with pytest.raises(ValueError, match=r"differ in length; pass accuracy_matrix\(rows\)"):
        continual.average_accuracy([[0.9], [0.5, 0.8]])
