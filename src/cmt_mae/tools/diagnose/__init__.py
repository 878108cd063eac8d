"""`cmt-mae doctor`, and the verdict of `report` and `watch`: images, teacher, cost, why a run does not learn.

run.py and verdict.py read files alone and import no torch.
"""
