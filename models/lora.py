"""LoRA (Hu et al. 2022) on the decoder, through `peft`: low-rank updates beside every linear of attention and MLP.

The decoder's modules have Hugging Face's Llama names, so an adapter saved here opens with `peft` over the same model
in `transformers`, and the other way round. No dropout, so that training draws nothing random. Where products are made in
bf16 anyway, the frozen weights are kept in it; the merge then goes by the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from models.checkpoint import Checkpoint
from models.decoder import Decoder

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_lora(decoder: Decoder, rank: int, alpha: float, source: Path, frozen: torch.dtype = torch.float32) -> PeftModel:
    """The decoder, frozen, with a trainable adapter W x + (alpha / rank) B A x. B begins at 0: nothing changes yet.

    frozen: dtype of the frozen weights beside an adapter; the adapters are float32.
    """
    model = get_peft_model(decoder, LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    config = model.peft_config["default"]
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", str(source)    # for whoever opens the adapter
    if frozen != torch.float32:
        for name, parameter in model.named_parameters():      # what stays is copied: then the file need not stay mapped
            parameter.data = parameter.data.to(frozen) if name.endswith(".base_layer.weight") else parameter.data.clone()
    return model


@torch.no_grad()
def merged_tensors(model: PeftModel, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The float32 tensors of `checkpoint`, which the model was made of, with the adapter added, one at a time."""
    decoder = model.get_base_model()
    for name in checkpoint.names():
        tensor = checkpoint.read(name).float()
        layer = decoder.get_submodule(name.rpartition(".")[0])
        adapted = name.endswith(".weight") and hasattr(layer, "get_delta_weight")
        yield name, tensor + layer.get_delta_weight("default").float().cpu() if adapted else tensor
