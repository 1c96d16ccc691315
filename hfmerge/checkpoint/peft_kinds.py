"""Kinds of adapters: which ones PEFT can merge into a base, which ones it cannot and why, and what each changes.

A kind is the `peft_type` of adapter_config.json. Only the names stand here; what the tensors of a kind mean is left to
PEFT's own layers (`peft_layers`), but for plain LoRA (`lora`), whose factors are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hfmerge.errors import UnsupportedError
from hfmerge.validation.values import show


PREFIXES: Mapping[str, str] = {
    "LORA": "lora_",
    "ADALORA": "lora_",
    "ADAMSS": "adamss_",
    "BEFT": "beft_",
    "BOFT": "boft_",
    "C3A": "c3a_",
    "DEFT": "deft_",
    "DELORA": "delora_",
    "FOURIERFT": "fourierft_",
    "GLORA": "glora_",
    "GRALORA": "gralora_",
    "HIRA": "hira_",
    "HRA": "hra_",
    "IA3": "ia3_",
    "LN_TUNING": "ln_tuning_layers.",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "MISS": "miss_",
    "OFT": "oft_",
    "OSF": "osf_",
    "PEANUT": "peanut_",
    "PSOFT": "psoft_",
    "PVERA": "pvera_",
    "RANDLORA": "randlora_",
    "ROAD": "road_",
    "SHIRA": "shira_",
    "SUPERTUNING": "supertuning_",
    "TINYLORA": "tinylora_",
    "TRAINABLE_TOKENS": "trainable_tokens_",
    "UNILORA": "unilora_",
    "VBLORA": "vblora_",
    "VERA": "vera_lambda_",
    "WAVEFT": "waveft_",
}
"""Kind that is merged -> how the names of its tensors begin, after the name of their module."""

SHARING = ("PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
"""Kinds whose modules share tensors: PEFT has to see all modules that the adapter changes, in the model's order."""

BIASED = ("ADAMSS", "BEFT", "GLORA", "IA3", "ROAD")
"""Kinds that change the biases of their modules too; Beft changes nothing else."""

_PROMPTS = "changes the model's input and no weight"
REASONS: Mapping[str, str] = {
    "ADAPTION_PROMPT": _PROMPTS,
    "CARTRIDGE": "holds keys and values of a cache and no weight",
    "CPT": _PROMPTS,
    "FROD": "decomposes all targeted weights of the model together",
    "LILY": "shares its factors by a router, which no weight can stand for",
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "POLY": "chooses its factors by the task of each input",
    "PREFIX_TUNING": "holds keys and values of a cache and no weight",
    "PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "SHADOW": "computes beside the model and changes no weight",
    "XLORA": "chooses its adapters by each input",
}
"""Kind that is not merged -> why."""

FIELDS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "layer_replication": ((None, []), "gives the model other layers"),
    "alora_invocation_tokens": ((None, []), "counts after certain tokens alone"),
    "arrow_config": ((None, {}), "chooses its factors by each token"),
    "use_qalora": ((False, None), "adds to a quantised base, on groups of inputs"),
    "loftq_config": ((None, {}), "was trained on a quantised base"),
}
"""Field of LoRA's configuration -> values with which an adapter is merged, and why it is not with any other one."""

INITS: Mapping[str, str] = {
    "pissa_niter": "PEFT decomposes the base at random, so that no two loads agree",
    "corda": "PEFT decomposes the base with data that the adapter does not hold",
    "lora_ga": "PEFT decomposes the base with data that the adapter does not hold",
    "loftq": "it was trained on a quantised base",
}
"""How `init_lora_weights` begins -> why such an adapter is not merged unless it was converted."""

DECOMPOSING = ("pissa", "olora")
"""Initialisations that take something out of the base when the adapter is loaded, always the same."""

LORA_FIELDS = frozenset(
    "alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config "
    "ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config "
    "layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout "
    "lora_ga_config megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version "
    "qalora_group_size r rank_pattern revision runtime_config target_modules target_parameters task_type "
    "trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config".split()
)
"""Fields of LoRA's configuration in the PEFT that is known here, which plain LoRA need not import."""

_CONVERT = "convert it to plain LoRA (peft: save_pretrained(path_initial_model_for_weight_conversion=...))"


def adapter_kind(config: Mapping[str, Any]) -> str:
    """The kind that adapter_config.json names; "" if it names none."""
    return str(config.get("peft_type") or "")


def check_mergeable(label: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that PEFT cannot merge, or not repeatably.

    Args:
        label: names the adapter.
        config: adapter_config.json.

    Raises:
        UnsupportedError: names kind, field and reason.
    """
    kind = adapter_kind(config)
    if kind not in PREFIXES:
        why = REASONS.get(kind)
        if why is None:
            raise UnsupportedError(
                f"{label}: `peft_type: {show(kind)}` is not known here; export the adapter as a full model "
                "(peft: merge_and_unload), and name that."
            )
        raise UnsupportedError(f"{label}: a {kind} adapter {why}, so it cannot be merged; leave it out.")
    if kind != "LORA":
        return
    for name, (allowed, why) in FIELDS.items():
        if config.get(name) not in allowed:
            raise UnsupportedError(
                f"{label}: LoRA with `{name}: {show(config[name])}` {why}, so it cannot be merged; leave it out."
            )
    init = init_of(config)
    for start, why in INITS.items():
        if init.startswith(start):
            raise UnsupportedError(f"{label}: `init_lora_weights: {show(init)}`: {why}; {_CONVERT}.")


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields of adapter_config.json that PEFT does not know, shown; it leaves them out."""
    known: Collection[str] = LORA_FIELDS
    if adapter_kind(config) != "LORA":
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = PEFT_TYPE_TO_CONFIG_MAPPING[adapter_kind(config)].__dataclass_fields__
    return [show(name) for name in sorted(config) if name not in known]


def init_of(config: Mapping[str, Any]) -> str:
    """How LoRA's factors were initialised, in lower case."""
    return str(config.get("init_lora_weights", True)).lower()


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a LoRA adapter changes a matrix by the product of its two factors alone."""
    variants = ("use_dora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config")
    return (
        adapter_kind(config) == "LORA"
        and not any(config.get(name) for name in variants)
        and not init_of(config).startswith(DECOMPOSING)
    )
