"""LoRA (Hu et al. 2022) on the decoder, through `peft`: low-rank updates beside every linear of attention and MLP.

The decoder's modules have Hugging Face's Llama names, so an adapter saved here opens with `peft` over the same model
in `transformers`, and the other way round; a GPT-2's adapter is saved for its own fused modules. No dropout, so that
training draws nothing random. Where products are made in bf16 anyway, the frozen weights are kept in it; the merge then
goes by the checkpoint's own.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from models.checkpoint import Checkpoint
from models.network.decoder import Decoder

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_FUSED = "c_attn"
GPT2_TARGETS = {   # linear: {where it stands: the Decoder's linears that it holds}
    GPT2_FUSED: {"attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}, "c_fc": {"mlp": ("mlp.up_proj",)},
    "c_proj": {"attn": ("self_attn.o_proj",), "mlp": ("mlp.down_proj",)}}


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


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors as `peft` reads them over the published model."""
    config = model.get_base_model().config
    if config.family != "gpt2" or not config.publishable:
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    peft_config = copy.deepcopy(model.peft_config["default"])
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    # The adapters of q, k and v side by side are one of three times the rank beside the fused linear: A is stacked, B has
    # them on its diagonal, and alpha grows with the rank.
    peft_config.rank_pattern = {GPT2_FUSED: 3 * peft_config.r}
    peft_config.alpha_pattern = {GPT2_FUSED: 3 * peft_config.lora_alpha}
    peft_config.target_modules, peft_config.fan_in_fan_out, peft_config.inference_mode = list(GPT2_TARGETS), True, True
    published: dict[str, torch.Tensor] = {}
    for layer in range(len(config.layers)):
        for theirs, ours in GPT2_TARGETS.items():
            for module, parts in ours.items():
                for side, join in (("A", torch.cat), ("B", lambda blocks: torch.block_diag(*blocks))):
                    found = [tensors[f"base_model.model.model.layers.{layer}.{part}.lora_{side}.weight"] for part in parts]
                    published[f"base_model.model.transformer.h.{layer}.{module}.{theirs}.lora_{side}.weight"] = join(found)
    folder.mkdir(parents=True, exist_ok=True)
    peft_config.save_pretrained(folder)
    save_file({name: tensor.detach().contiguous() for name, tensor in published.items()}, folder / "adapter_model.safetensors",
              metadata={"format": "pt"})


@torch.no_grad()
def merged_tensors(model: PeftModel, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The float32 tensors of `checkpoint`, which the model was made of, with the adapter added, one at a time."""
    decoder = model.get_base_model()
    for name in checkpoint.names():
        tensor = checkpoint.read(name).float()
        layer = decoder.get_submodule(name.rpartition(".")[0])
        adapted = name.endswith(".weight") and hasattr(layer, "get_delta_weight")
        yield name, tensor + layer.get_delta_weight("default").float().cpu() if adapted else tensor
