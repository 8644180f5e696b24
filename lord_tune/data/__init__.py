"""Text data: rows of files and datasets."""
