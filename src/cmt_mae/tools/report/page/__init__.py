"""The page of a run: read (record.py), judged (verdict.py), drawn (curves.py), written as HTML (render.py).

Reads files only; of a run nothing is changed but its report.html.
"""
