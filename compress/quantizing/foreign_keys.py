"""What the keys of other projects' `quantization_config` say, and which of their values are read here.

Every key has a rule: `True` (says how the codes were found or how a kernel runs them, not what they mean) or the values
that are understood; a value that switches something off is too, unless the rule is that it be on. What has no rule, or
another value, is refused by name, because a layout read wrongly gives weights that look right.
"""

from runtime.errors import UserError

_HOW_FOUND = dict.fromkeys((
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "damp_percent", "damp_auto_increment", "static_groups",
    "true_sequential", "sym", "desc_act", "dataset", "tokenizer", "meta", "model_name_or_path", "model_file_base_name",
    "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "batch_size",
    "pad_token_id", "cache_block_outputs", "mse", "act_group_aware", "use_cuda_fp16", "use_exllama", "disable_exllama",
    "exllama_config", "max_input_length", "modules_to_not_convert", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "lm_head",
    "inside_layer_modules", "autoround_version", "iters", "seqlen", "nsamples", "lr", "minmax_lr", "low_gpu_mem_usage", "amp",
    "enable_quanted_input", "enable_minmax_tuning", "quantizer", "offload_to_disk", "offload_to_disk_path",
    "auto_forward_data_parallel", "gradient_accumulate_steps", "train_bs", "scale_dtype", "enable_norm_bias_tuning",
    "to_quant_block_names", "quant_block_list"), True)
KEYS = {
    "gptq": _HOW_FOUND | {"checkpoint_format": ("gptq", "gptq_v2"), "format": ("gptq", "gptq_v2"), "method": ("gptq",),
                          "pack_dtype": ("int32",), "backend": True, "data_type": ("int",)},
    "awq": _HOW_FOUND | {"version": ("gemm", "GEMM"), "format": ("gemm",), "checkpoint_format": ("gemm",), "method": ("awq",),
                         "pack_dtype": ("int32",), "zero_point": (True,), "backend": ("autoawq", "auto")},
    "compressed-tensors": {
        "quant_method": True, "format": ("pack-quantized",), "config_groups": True, "ignore": True, "version": True,
        "quantization_status": ("compressed", "frozen"), "global_compression_ratio": True},
}
NEEDED = {"awq": ("zero_point",), "gptq": (), "compressed-tensors": ("format", "config_groups")}
_GROUP = {"targets": True, "weights": True, "format": ("pack-quantized",)}
_WEIGHTS = {"num_bits": True, "type": ("int",), "group_size": True, "strategy": ("group", "channel"), "symmetric": (True,),
            "actorder": ("weight", "static", "group", "dynamic", True, False),          # weight_g_idx says whether groups lie in order
            "observer": True, "observer_kwargs": True, "scale_dtype": True, "zp_dtype": True}


def check_keys(config: dict, where: str, known: dict, needed: tuple[str, ...] = ()) -> None:
    """Raises UserError for a key without a rule, and for a value that its rule does not have."""
    for key, value in config.items():
        rule = known.get(key, ())
        off = value is None or (value is False and True not in (() if rule is True else rule)) or value in ([], {}, "")
        if rule is True or (off and key not in needed):
            continue
        if not any(type(value) is type(allowed) and value == allowed for allowed in rule):
            read = f"read are {', '.join(map(repr, rule))}" if rule else "this key is not known here"
            raise UserError(f"{where} has {key} {value!r}, which would change how the weights are to be read: {read}")
    if missing := [key for key in needed if key not in config]:
        raise UserError(f"{where} lacks {missing[0]}, without which the weights cannot be read for certain")


def scheme(config: dict) -> tuple[str, int, int]:
    """Method, bits and group (-1: one for a row) of a `quantization_config`. Raises UserError for what is not understood."""
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in KEYS:
        raise UserError(f"quantization method {method!r} is not known: known are {', '.join(KEYS)}")
    dynamic, sparsity = config.get("dynamic"), config.get("sparsity_config")
    if method == "gptq" and isinstance(dynamic, dict) and all(pattern.startswith("-:") for pattern in dynamic):
        config = config | {"dynamic": None}                                      # left dense: the file shows which
    if method == "compressed-tensors" and isinstance(sparsity, dict) and sparsity.get("format") == "dense":
        config = config | {"sparsity_config": None}                              # zeros, if any, are stored as others are
    check_keys(config, "quantization_config", KEYS[method], NEEDED[method])
    if method != "compressed-tensors":
        for one, other in (("bits", "w_bit"), ("group_size", "q_group_size"), ("checkpoint_format", "format")):
            if config.get(one) is not None and config.get(other) not in (None, config[one]):
                raise UserError(f"quantization_config has {one} {config[one]!r} and {other} {config[other]!r}, which mean the same")
        return method, *_sizes(config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size")))
    groups = config["config_groups"]
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict) \
            or not isinstance(weights := group.get("weights"), dict):
        raise UserError(f"quantization_config has config_groups {str(groups)[:80]}: one group that describes its weights is read")
    check_keys(group, "config_groups", _GROUP)
    check_keys(weights, "weights of config_groups", _WEIGHTS)
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy not in (None, "channel" if size in (None, -1) else "group"):
        raise UserError(f"weights of config_groups have strategy {strategy!r} and group_size {size!r}, which do not go together")
    return method, *_sizes(weights.get("num_bits"), -1 if size is None else size)


def _sizes(bits, group) -> tuple[int, int]:
    if type(bits) is not int or bits not in (2, 4, 8) or type(group) is not int or group < -1:
        raise UserError(f"quantization_config has bits {bits!r} and group_size {group!r}: bits 2, 4 and 8 are read")
    return bits, group
