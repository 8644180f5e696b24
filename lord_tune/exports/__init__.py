"""Write a model in another form and verify it: run.py drives, one file per form."""
