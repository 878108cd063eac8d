"""How good a frozen backbone is: one function a task, each returning a Result with its protocol."""

from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear
from cmt_mae.evaluate.result import Result

__all__ = ["KnnConfig", "LinearConfig", "Result", "evaluate_knn", "evaluate_linear"]
