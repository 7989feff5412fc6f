from collections.abc import Callable, Sequence
from typing import Any

def build_info() -> dict[str, str]: ...
def cpu_features() -> list[str]: ...
def explain(
    *,
    device: str = "cpu",
    dtype: str,
    batch: int,
    tokens: int = 1,
    num_basis: int,
    num_local: int = 0,
    out_features: int,
    in_features: int,
) -> dict[str, list[tuple[str, float]]]: ...
def torch_product_outruns_tiles() -> bool: ...
def tile_seconds(dtype: str, rows: int, cols: int, depth: int, repeats: int) -> float: ...
def fused_function(
    name: str, differentiable: Sequence[int], formula: Callable[..., Any]
) -> Callable[..., Any]: ...
