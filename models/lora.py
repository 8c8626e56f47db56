"""LoRA (Hu et al. 2022) on the decoder, through `peft`: low-rank updates beside every linear of attention and MLP.

The decoder's modules have Hugging Face's Llama names, so an adapter saved here opens with `peft` over the same model
in `transformers`, and the other way round. No dropout, so that training draws nothing random.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from models.decoder import Decoder

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_lora(decoder: Decoder, rank: int, alpha: float, source: Path) -> PeftModel:
    """The decoder, frozen, with a trainable adapter W x + (alpha / rank) B A x. B begins at 0: nothing changes yet."""
    model = get_peft_model(decoder, LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    config = model.peft_config["default"]
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", str(source)    # for whoever opens the adapter
    return model


@torch.no_grad()
def merged_tensors(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The decoder's tensors with the adapter added, one at a time; the model stays as it is."""
    decoder = model.get_base_model()
    for name, tensor in decoder.state_dict().items():
        if ".base_layer." in name:
            module, _, kind = name.partition(".base_layer.")
            delta = decoder.get_submodule(module).get_delta_weight("default") if kind == "weight" else 0
            yield f"{module}.{kind}", tensor + delta
        elif ".lora_" not in name:
            yield name, tensor
