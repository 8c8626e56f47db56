"""Open a bundle and generate text, without torch: `from runtime import Engine`."""

__version__ = "0.1.0"               # of all of Edgewright; pyproject.toml reads it here


def __getattr__(name: str):
    """`Engine`, imported on first use, so that `import runtime` and its command lines stay light."""
    if name == "Engine":
        from runtime.engine import Engine
        return Engine
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
