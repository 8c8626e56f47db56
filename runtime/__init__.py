"""Open a bundle and generate text, without torch: `from runtime import Engine`."""


def __getattr__(name: str):
    """`Engine`, imported on first use, so that `import runtime` and its command lines stay light."""
    if name == "Engine":
        from runtime.engine import Engine
        return Engine
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
