"""The settings of YaRN that the golden file yarn.npz was made with."""

import copy
from typing import Any

LENGTH = 64
"""Tokens said to be the native length of the tiny checkpoints; their prompts have four times as many."""
VARIANTS = ("b-r2-d64", "c-r3-d128")
SETTINGS: dict[str, dict[str, Any]] = {
    "card": {"factor": 4.0, "original_max_position_embeddings": 262144},
    "short": {"factor": 4.0, "original_max_position_embeddings": LENGTH},
    "betas": {"factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
    "no_ramp": {"factor": 2.0, "original_max_position_embeddings": 4096, "beta_fast": 4.0, "beta_slow": 4.0},
    "not_truncated": {"factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False},
    "mscale": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7},
    "one_mscale": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.5},
    "attention_factor": {"factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.25},
    "factor_one": {"factor": 1.0, "original_max_position_embeddings": 32768},
}


def rope_parameters(setting: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a released config.json with this YaRN."""
    return {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0,
        "rope_type": "yarn",
        **setting,
    }


def with_yarn(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a golden checkpoint, with YaRN as the model cards write it."""
    config = copy.deepcopy(config)
    config["text_config"]["rope_parameters"] |= {"rope_type": "yarn", **SETTINGS["short"]}
    return config
