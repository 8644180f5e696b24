"""Measure a model: perplexity.py, speed.py; run.py does both."""
