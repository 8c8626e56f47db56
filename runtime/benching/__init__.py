"""Parts of `python -m runtime.bench`: what is measured, against whom, under which conditions, and how it is told."""
