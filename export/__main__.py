"""`python -m export` lists what can be done here."""

from runtime.cli import list_commands

COMMANDS = {"make a bundle, prove it": ("onnx", "ort", "verify", "draft"),
            "for NVIDIA GPUs": ("trt",)}

if __name__ == "__main__":
    raise SystemExit(list_commands("export", COMMANDS))
