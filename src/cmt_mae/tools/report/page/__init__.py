"""The page of a run: facts (facts.py, cost.py, results.py), charts and pictures, written as HTML (render.py).

What it shows is read by core/run_reader.py and judged by tools/diagnose. Of a run nothing is changed but its
report.html.
"""
