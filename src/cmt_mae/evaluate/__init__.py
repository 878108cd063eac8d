"""How good a frozen backbone is: one function a task, each returning a Result with its protocol."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
    from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
    from cmt_mae.evaluate.result import Result

_HOMES = {
    "KnnConfig": "knn",
    "LinearConfig": "linear",
    "Result": "result",
    "evaluate_knn": "knn",
    "evaluate_linear": "linear",
}
__all__ = ["KnnConfig", "LinearConfig", "Result", "evaluate_knn", "evaluate_linear"]


def __getattr__(name: str) -> Any:
    """Import on first use: tables and reports of results do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cmt_mae.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"cmt_mae.evaluate.{_HOMES[name]}"), name)
