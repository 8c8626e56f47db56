"""`python -m models` lists what can be done here."""

from runtime.cli import list_commands

COMMANDS = {"get a model, look at it": ("get", "random_checkpoint", "info"),
            "train one": ("tokenizer", "train", "finetune", "ngram", "train_bench"),
            "judge one": ("evaluate", "compare", "what_got_worse", "acceptance", "lm_eval_adapter", "encoder_bench")}

if __name__ == "__main__":
    raise SystemExit(list_commands("models", COMMANDS))
