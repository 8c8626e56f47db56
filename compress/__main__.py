"""`python -m compress` lists what can be done here."""

from runtime.cli import list_commands

COMMANDS = {"do all of it": ("run",),
            "fewer bits": ("quantize", "recover", "foreign"),
            "fewer weights": ("prune", "distill", "teacher")}

if __name__ == "__main__":
    raise SystemExit(list_commands("compress", COMMANDS))
