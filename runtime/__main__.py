"""`python -m runtime` lists what can be done here."""

from .cli import list_commands

COMMANDS = {"run a bundle": ("generate", "chat", "serve"),
            "learn from what people say of its replies": ("feedback",),
            "check and measure it on this machine": ("verify", "bench", "native.profile")}

if __name__ == "__main__":
    raise SystemExit(list_commands(__package__, COMMANDS))
