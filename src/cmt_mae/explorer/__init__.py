"""`cmt-mae app`: look at attention, masks and features by hand, in the browser."""

from cmt_mae.explorer.command import AppConfig, app

__all__ = ["AppConfig", "app"]
