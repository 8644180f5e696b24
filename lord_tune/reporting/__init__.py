"""`lord-tune report`: verb.py (the story), runs.py, measured.py, parts.py, trained.py (what is read), tables.py,
numbers.py, figures.py, themed_svg.py (what is shown), page.py and page.html (the page)."""
