"""manifold_conv1d/2d/3d: a loop over samples of torch's convolution with each sample's kernel."""

import itertools

import numpy as np
import pytest
import torch
from bounds import check
from conv_entries import conv_call
from op_entries import OPS
from sampling import DTYPES, Draw
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import neuromod_ext.functional as MF
from neuromod_ext import _conv, _conv_checks, _ops

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
OURS = {1: MF.manifold_conv1d, 2: MF.manifold_conv2d, 3: MF.manifold_conv3d}
OPTIONS = [
    {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for stride, padding, dilation, groups in itertools.product(
        (1, 2), (0, 1, "same", "valid"), (1, 2), (1, 2)
    )
    if not (padding == "same" and stride != 1)
]


def operands(dims: int, groups: int, dtype: torch.dtype = torch.float64, samples: int = 3):
    d = Draw(f"conv/{dims}/{groups}", dtype)
    x = d.tensor(samples, 4, *(7, 6, 5)[:dims])
    return x, d.tensor(3, 6, 4 // groups, *(3, 2, 1)[:dims]), d.coeff(samples, 3), d.tensor(3, 6)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("dims", PLAIN)
def test_equals_a_loop(dims, options) -> None:
    x, P, c, b = operands(dims, options["groups"])
    for bias in (None, b):
        want = [
            PLAIN[dims](
                x[i : i + 1],
                torch.tensordot(c[i], P, 1),
                None if bias is None else c[i] @ bias,
                **options,
            )
            for i in range(len(x))
        ]
        torch.testing.assert_close(OURS[dims](x, P, c, bias, **options), torch.cat(want))


@pytest.mark.parametrize("dims", PLAIN)
def test_tuples(dims) -> None:
    """Options one a dimension, positional as in torch."""
    x, P, c, b = operands(dims, 1)
    options = [(2, 1, 1)[:dims], (1, 0, 2)[:dims], (1, 2, 1)[:dims]]
    want = [
        PLAIN[dims](x[i : i + 1], torch.tensordot(c[i], P, 1), c[i] @ b, *options) for i in range(3)
    ]
    torch.testing.assert_close(OURS[dims](x, P, c, b, *options), torch.cat(want))


@pytest.mark.parametrize("dims", PLAIN)
@pytest.mark.parametrize("coeff_shape", [(3,), (1, 3)])
def test_one_condition(dims, coeff_shape) -> None:
    """One plain convolution, of a batch or of one unbatched sample."""
    x, P, c, b = operands(dims, 1)
    c = c[0].reshape(coeff_shape)
    W, shift = torch.tensordot(c.view(3), P, 1), c.view(3) @ b
    torch.testing.assert_close(OURS[dims](x, P, c, b), PLAIN[dims](x, W, shift))
    torch.testing.assert_close(OURS[dims](x[0], P, c, b), PLAIN[dims](x[0], W, shift))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", PLAIN)
def test_one_basis_point_is_torch_conv(dims, dtype) -> None:
    x, P, _, b = operands(dims, 2, dtype)
    c = torch.ones(3, 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = OURS[dims](x, P[:1], c, b[:1], groups=2)
    want = PLAIN[dims](x.double(), P[0].double(), b[0].double(), groups=2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=0, atol=50 * torch.finfo(dtype).eps)


FEW_CHANNELS = [  # B, C, O, space, kernel, padding, dilation, groups
    (16, 3, 30, [9, 11], [3, 3], [0, 0], [1, 1], 1),
    (17, 1, 9, [300], [4], [2], [3], 1),
    (8, 2, 33, [4, 5, 6], [2, 2, 3], [1, 0, 2], [1, 2, 1], 2),
    (16, 1, 7, [3, 600], [1, 5], [0, 1], [1, 1], 1),
    (6, 5, 97, [40, 40], [3, 5], [2, 4], [2, 1], 3),
]


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", FEW_CHANNELS, ids=str)
def test_gradient_of_few_channels(sizes, dtype, finite: bool) -> None:
    """On the CPU of pixels of g that are added up, unless a weight is infinite."""
    B, C, O, space, kernel, padding, dilation, groups = sizes
    options = {"stride": [1] * len(space), "padding": padding, "dilation": dilation}
    draw = Draw(f"few channels/{sizes}/{dtype}", dtype)
    call = conv_call(draw, "gxPcb", B, 3, C, O, space, kernel, options | {"groups": groups}, True)
    call.others["needed"] = [True, False, False, False]
    if not finite:
        call.tensors[2].view(-1)[-1] = torch.inf
    op = OPS["manifold_conv_backward"]
    got, want = op.run(_ops.OPS[op.name], call)[0], op.expected(call)[0]
    if finite:
        check(got, want, draw)
    else:
        of = np.isfinite if dtype.itemsize == 2 else np.isnan  # an odd depth is padded
        assert (of(got.double().numpy()) == of(want.value)).all()


@pytest.mark.parametrize("dims", PLAIN)
def test_empty_batch(dims) -> None:
    x, P, c, b = operands(dims, 1)
    out = OURS[dims](x, P, c, b)
    none = OURS[dims](x[:0], P, c[:0], b)
    assert none.shape == (0, *out.shape[1:])


def bad_calls(dims: int):
    space, kernel = (5, 5, 5)[:dims], (3, 3, 3)[:dims]
    x, P, c, b = (
        torch.ones(4, 2, *space),
        torch.ones(3, 6, 2, *kernel),
        torch.ones(4, 3),
        torch.ones(3, 6),
    )
    numbers = f"{dims} number{'s' if dims > 1 else ''}"
    letters = {1: "L", 2: "H, W", 3: "D, H, W"}[dims]
    good = {"input": x, "basis": P, "coeff": c, "bias": b}
    changes = [
        ({"input": None}, TypeError, "input to be a Tensor, got NoneType"),
        ({"coeff": 0.5}, TypeError, "coeff to be a Tensor, got float"),
        (
            {"input": x.long()},
            TypeError,
            "input of dtype float64, float32, bfloat16 or float16, got int64",
        ),
        (
            {"basis": P.double()},
            TypeError,
            "basis of dtype float32 (that of input), got float64; convert one of them",
        ),
        ({"basis": P[0]}, ValueError, "basis of shape [K, O, C / groups, k"),
        (
            {"basis": P[:0], "coeff": c[:, :0]},
            ValueError,
            "basis with at least one basis point (K >= 1), got K = 0",
        ),
        (
            {"coeff": c.double()},
            TypeError,
            "coeff of dtype float32 (in which sums over float32 basis run), got float64",
        ),
        ({"coeff": c[:2]}, ValueError, "coeff of shape [B, K] = [4, 3], got [2, 3]"),
        ({"coeff": c[:, :2]}, ValueError, "coeff of shape [B, K] = [4, 3], got [4, 2]"),
        ({"coeff": c[0, :2]}, ValueError, "coeff of shape [..., K] = [..., 3], got [2]"),
        ({"coeff": c[None]}, ValueError, "coeff of shape [B, K], got [1, 4, 3]"),
        ({"coeff": c[0, 0]}, ValueError, "coeff of shape [B, K], got []"),
        ({"input": x[0]}, ValueError, f"input of shape [B, C, {letters}], got"),
        (
            {"input": x[0, 0], "coeff": c[0]},
            ValueError,
            f"input of shape [B, C, {letters}] or [C, {letters}], got",
        ),
        (
            {"input": torch.ones(4, 3, *space)},
            ValueError,
            "input of 2 channels (basis.shape[2] * groups = 2 * 1), got 3",
        ),
        ({"groups": 2}, ValueError, "input of 4 channels (basis.shape[2] * groups = 2 * 2), got 2"),
        ({"groups": 4}, ValueError, "groups >= 1 that divides O = 6, got 4"),
        ({"groups": 0}, ValueError, "groups >= 1 that divides O = 6, got 0"),
        ({"groups": -1}, ValueError, "groups >= 1 that divides O = 6, got -1"),
        ({"bias": b[0]}, ValueError, "bias of shape [K, O] = [3, 6], got [6]"),
        ({"bias": b.double()}, TypeError, "bias of dtype float32 (that of basis), got float64"),
        (
            {"basis": P.to("meta")},
            ValueError,
            "basis on cpu (where input is), got meta; move one of them",
        ),
        (
            {"coeff": c.to("meta")},
            ValueError,
            "coeff on cpu (where basis is), got meta; move one of them",
        ),
        ({"stride": 0}, ValueError, f"stride of {numbers} >= 1, got {[0] * dims}"),
        ({"stride": [1] * 4}, ValueError, f"stride of {numbers} >= 1, got [1, 1, 1, 1]"),
        ({"padding": -1}, ValueError, f"padding of {numbers} >= 0, got {[-1] * dims}"),
        ({"padding": "some"}, ValueError, "padding of numbers, 'same' or 'valid', got 'some'"),
        (
            {"padding": "same", "stride": 2},
            ValueError,
            f"a stride of 1 with padding='same', got {[2] * dims}",
        ),
        ({"dilation": 0}, ValueError, f"dilation of {numbers} >= 1, got {[0] * dims}"),
        (
            {"dilation": 3},
            ValueError,
            f"basis with a kernel within the padded input {[5] * dims}, "
            f"got one that spans {[7] * dims}",
        ),
    ]
    return good, changes


@pytest.mark.parametrize("row", range(30))
@pytest.mark.parametrize("dims", PLAIN)
def test_bad_calls(dims, row) -> None:
    good, changes = bad_calls(dims)
    assert len(changes) == 30
    OURS[dims](**good)
    change, error, words = changes[row]
    with pytest.raises(error) as caught:
        OURS[dims](**good | change)
    assert str(caught.value).startswith(f"manifold_conv{dims}d: expected {words}")


PLANNED = [
    pytest.param((2, 3, 8, 8), (2, 4, 3, 3, 3), {}, "windows", id="plain"),
    pytest.param((2, 3, 9), (2, 4, 3, 3), {}, "windows", id="1d"),
    pytest.param((2, 6, 8, 8), (2, 4, 3, 3, 3), {"groups": 2}, "windows", id="groups"),
    pytest.param((2, 3, 8, 8), (2, 3, 1, 3, 3), {"groups": 3}, "grouped", id="depthwise"),
    pytest.param((2, 3, 8, 8), (2, 6, 1, 3, 3), {"groups": 3}, "windows", id="multiplier"),
    pytest.param((2, 32, 3, 3), (2, 32, 32, 3, 3), {}, "stacked", id="one_pixel"),
    pytest.param((2, 3, 3, 3), (2, 4, 3, 3, 3), {}, "windows", id="one_small_pixel"),
    pytest.param((2, 3, 6, 6, 6), (2, 4, 3, 3, 3, 3), {}, "grouped", id="3d"),
]


def walk(x, P, **options):
    filled = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options
    return _conv_checks.walk("test", x, P, **filled)[0]


@pytest.mark.parametrize(("x_shape", "P_shape", "options", "want"), PLANNED)
def test_plan(x_shape, P_shape, options, want, monkeypatch) -> None:
    """The plan goes by shapes; every plan yields the same, gradients included."""
    d = Draw("plan")
    args = [d.tensor(*x_shape), d.tensor(*P_shape), d.coeff(2, 2), d.tensor(2, P_shape[1])]
    assert _conv.plan(args[0], args[1], walk(*args[:2], **options)) == want
    other = "grouped"  # on a device that has no kernel
    assert _conv.plan(*(t.to("meta") for t in args[:2]), walk(*args[:2], **options)) == other
    results = []
    for plan in _conv.PLANS:
        monkeypatch.setattr(_conv, "FORCED", plan)
        assert _conv.plan(args[0], args[1], walk(*args[:2], **options)) == plan
        leaves = [t.clone().requires_grad_() for t in args]
        out = OURS[len(x_shape) - 2](*leaves, **options)
        assert ("FusedFunction" in out.grad_fn.name()) == (plan == "windows")
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


ON_CUDA = [
    pytest.param((64, 64, 32, 32), (3, 64, 64, 3, 3), {"padding": 1}, "windows", id="plain"),
    pytest.param((64, 32, 8, 8, 8), (3, 32, 32, 3, 3, 3), {"padding": 1}, "windows", id="3d"),
    pytest.param((64, 64, 32, 32), (3, 64, 1, 3, 3), {"groups": 64}, "grouped", id="depthwise"),
    pytest.param((64, 512, 7, 7), (3, 512, 512, 3, 3), {"padding": 1}, "stacked", id="few_pixels"),
    pytest.param((64, 512, 28, 28), (3, 512, 512, 3, 3), {"padding": 1}, "windows", id="many"),
    pytest.param((64, 32, 7, 7), (3, 32, 32, 3, 3), {"padding": 1}, "windows", id="small"),
]


@pytest.mark.parametrize(("x_shape", "P_shape", "options", "want"), ON_CUDA)
def test_plan_on_cuda(x_shape, P_shape, options, want) -> None:
    with FakeTensorMode():
        x, P = torch.empty(x_shape, device="cuda"), torch.empty(P_shape, device="cuda")
    assert _conv.plan(x, P, walk(x, P, **options)) == want


def test_plan_is_named() -> None:
    """An unknown plan in the environment is refused."""
    x, P, c, _ = operands(2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_conv, "FORCED", "unheard_of")
        with pytest.raises(ValueError, match="to be windows, grouped or stacked, got unheard_of"):
            MF.manifold_conv2d(x, P, c)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_images_and_batches_beyond_a_block(dtype: torch.dtype) -> None:
    """Rows wider than 128 pixels, several tiles of outputs, more samples than are held at once."""
    torch.manual_seed(0)
    x, P = torch.randn(20, 2, 5, 131, dtype=dtype), torch.randn(2, 70, 2, 3, 3, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, P, torch.randn(20, 2, dtype=dtype))]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = MF.manifold_conv2d(*leaves, padding=1)
    kernels = torch.einsum("bk,koihw->boihw", wide[2], wide[1])
    want = torch.cat(
        [F.conv2d(a[None], w, padding=1) for a, w in zip(wide[0], kernels, strict=True)]
    )
    grad = torch.randn_like(out)
    pairs = zip(
        [out, *torch.autograd.grad(out, leaves, grad)],
        [want, *torch.autograd.grad(want, wide, grad.double())],
        strict=True,
    )
    for got, expected in pairs:
        size = float(expected.abs().max())
        torch.testing.assert_close(
            got.double(),
            expected,
            rtol=0,
            atol=size * 1e-5 if dtype == torch.float32 else size * 1e-13,
        )
