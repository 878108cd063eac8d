"""`cmt-mae app`: look at attention, masks and features by hand, in the browser."""

from cmt_mae.tools.app.command import AppConfig, app

__all__ = ["AppConfig", "app"]
