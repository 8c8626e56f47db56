"""Checkpoints and the files beside them: read and written."""
