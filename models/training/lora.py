"""LoRA (Hu et al. 2022) on the decoder, through `peft`: low-rank updates beside every linear of the layers but routers.

A family whose modules have the decoder's names shares its adapters with `peft` over the same model in `transformers`. Another's
are saved for its own modules: renamed, their rows in its order, its constant factors taken out, and the adapters of linears that it
keeps fused as one of several times the rank. No dropout, so that training draws nothing random. Where products are made in bf16
anyway, the frozen weights are kept in it; the merge then goes by the checkpoint's own.

The product is our own, in fewer steps than `peft`'s: on a GPU a step of a small model takes as long as its kernels take to begin.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from models.checkpoint import Checkpoint
from models.families import FAMILIES, text_config
from models.formats.weight_names import Naming, places
from models.network.config import ModelConfig
from models.network.decoder import Decoder, named_groups, tensor_shapes
from runtime.errors import UserError


def adapted(config: ModelConfig) -> list[str]:
    """The linears that adapters stand beside, by module name."""
    return [reader for blocks in named_groups(config) for groups in blocks for group in groups for reader in group.readers
            if not reader.endswith(".router")]


def check_adapters(checkpoint: Checkpoint, kept: bool) -> None:
    """Raises UserError for a model that adapters cannot stand beside, or, where they are to be kept, not beside its own modules."""
    config = checkpoint.config
    if not adapted(config):
        raise UserError(f"{checkpoint.path} is a {config.gated}, which has no linears beside which adapters could stand: choose --method full")
    if kept and any(layer.experts for layer in config.layers):
        raise UserError(f"--keep-adapter: {config.family} keeps its experts in one tensor, beside which peft has no adapters: leave it out, "
                        f"and the adapter is merged")


def add_lora(decoder: Decoder, rank: int, alpha: float, source: Path, frozen: torch.dtype = torch.float32) -> PeftModel:
    """The decoder, frozen, with a trainable adapter W x + (alpha / rank) B A x. B begins at 0: nothing changes yet.

    frozen: dtype of the frozen weights beside an adapter; the adapters are float32.
    """
    targets = list(dict.fromkeys(name.rpartition(".")[2] for name in adapted(decoder.config)))
    model = get_peft_model(decoder, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = partial(_beside, module)
    config = model.peft_config["default"]
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", str(source)    # for whoever opens the adapter
    if frozen != torch.float32:
        for name, parameter in model.named_parameters():      # what stays is copied: then the file need not stay mapped
            parameter.data = parameter.data.to(frozen) if name.endswith(".base_layer.weight") else parameter.data.clone()
    return model


def _beside(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """W x + (alpha / rank) B A x: the second product is added to the first, scaled, as it is made. `peft` makes it, scales it and adds
    it, and in mixed precision makes a float32 copy of x before, which is then cast back."""
    y, low = layer.base_layer(x), F.linear(x, layer.lora_A["default"].weight)
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), layer.lora_B["default"].weight.T, alpha=layer.scaling["default"]).view_as(y)


@torch.no_grad()
def save_adapter(model: PeftModel, folder: Path, hf_config: dict) -> None:
    """Write adapter_config.json and adapter_model.safetensors as `peft` reads them over the published model, whose config.json holds
    hf_config."""
    config, hf = model.get_base_model().config, text_config(hf_config)
    naming = FAMILIES[config.family].naming
    if naming == Naming() or hf.get("edgewright_tensors"):
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    peft_config, ours = copy.deepcopy(model.peft_config["default"]), {f"{name}.weight" for name in adapted(config)}
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    published: dict[str, torch.Tensor] = {}
    rank, ranks = peft_config.r, {}
    for theirs, held in places(naming, config, hf, tensor_shapes(config)).items():
        if not ours.intersection(name for name, _ in held):
            continue
        # Several in one: A is stacked, B has each in its own rows and columns, and alpha grows with the rank.
        sides = [[tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"].cpu() for name, _ in held]
                 for side in "AB"]
        whole = held[0][1].whole or (len(sides[1][0]),)
        wide = torch.zeros(whole[1] if held[0][1].transposed else whole[0], rank * len(held))
        for number, ((_, part), b) in enumerate(zip(held, sides[1])):
            replace(part, transposed=False).put(b, wide[:, number * rank:(number + 1) * rank])
        module = theirs.removesuffix(".weight")
        published[f"base_model.model.{module}.lora_A.weight"] = torch.cat(sides[0])
        published[f"base_model.model.{module}.lora_B.weight"] = wide
        ranks[module.rpartition(".")[2]] = rank * len(held)
    larger = {name: found for name, found in ranks.items() if found != rank}
    peft_config.rank_pattern = larger
    peft_config.alpha_pattern = {name: peft_config.lora_alpha * (found // rank) for name, found in larger.items()}
    peft_config.target_modules, peft_config.fan_in_fan_out, peft_config.inference_mode = list(ranks), bool(naming.transposed), True
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
