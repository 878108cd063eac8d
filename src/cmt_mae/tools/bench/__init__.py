"""How fast a step is: `cmt-mae bench`, the count of its multiplications and the share of each part."""

from cmt_mae.tools.bench.command import BenchConfig, bench

__all__ = ["BenchConfig", "bench"]
