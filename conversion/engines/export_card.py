"""The card of an export: what it is part of, which experts it has, and the commands that run it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ...checkpoints.side_files import optional_file
from ...configuration import EmoConfig
from ...subsets.numbering import size_range
from .routing_shape import RoutingShape

_LAYOUT_NAMES = {"qwen2-moe": "A Qwen2-MoE", "deepseek": "A DeepSeek-MoE (v1)", "gguf": "A GGUF"}


@dataclass(frozen=True)
class Exported:
    """What a card says.

    Args:
        name (`str`): the folder's name.
        to (`str`): the layout.
        kind (`str`): the type of its numbers.
        about (`Mapping[str, Any]`): `model`, `revision`, `license`, `retained_experts` and
            `root_experts_per_layer`, each but the first *optional*.
        config (`EmoConfig`): the config of the model that was exported.
        shape (`RoutingShape`): its experts.

    Example: see `export_card`.
    """

    name: str
    to: str
    kind: str
    about: Mapping[str, Any]
    config: EmoConfig
    shape: RoutingShape


def export_card(exported: Exported) -> str:
    """The card, as text.

    Args:
        exported (`Exported`): what it is about.

    Example:

    ```python
    >>> from transformers_emo import EmoConfig
    >>> from transformers_emo.conversion.engines.export_card import Exported, export_card
    >>> from transformers_emo.conversion.engines.routing_shape import routing_shape
    >>> config = EmoConfig(num_hidden_layers=2)
    >>> shape = routing_shape(config, "qwen2-moe", [])
    >>> card = export_card(Exported("emo", "qwen2-moe", "bf16", {"model": "me/emo"}, config, shape))
    >>> "vllm serve" in card, "base_model: me/emo" in card
    (True, True)

    ```
    """
    data = {
        "license": exported.about.get("license"),
        "base_model": exported.about["model"] if "/" in exported.about["model"] else None,
        "library_name": "gguf" if exported.to == "gguf" else "transformers",
        "pipeline_tag": "text-generation",
    }
    lines = ["---", *(f"{name}: {value}" for name, value in data.items() if value)]
    lines += ["tags:", "- emo", "- mixture-of-experts"]
    lines += ["- expert-subset"] if exported.about.get("retained_experts") else []
    lines += ["---", "", f"# {exported.name}", "", *_origin(exported), "", *_how_to_run(exported)]
    return "\n".join(lines) + "\n"


def licence_of(model: str | os.PathLike, **hub_kwargs: Any) -> str | None:
    """The licence that a model's card names.

    Args:
        model (`str` or `os.PathLike`): folder or Hub repository of the model.
        hub_kwargs: `revision`, `token` and so on, as for `from_pretrained`.

    Example:

    ```python
    >>> from transformers_emo.conversion.engines.export_card import licence_of
    >>> licence_of("model_cards/emo-tiny")
    'apache-2.0'

    ```
    """
    found = optional_file(model, "README.md", **hub_kwargs)
    if found is None:
        return None
    try:
        licence = ModelCard.load(Path(found), ignore_metadata_errors=True).data.license
    except (ValueError, OSError):  # a card that cannot be read says nothing
        return None
    return licence if isinstance(licence, str) else None


def _origin(exported: Exported) -> list[str]:
    about, config = exported.about, exported.config
    revision = f" at commit {about['revision']}" if about.get("revision") else ""
    text = (
        f"{_LAYOUT_NAMES[exported.to]} that computes what the EMO `{about['model']}`{revision} "
        f"computes, written by transformers-emo. Numbers: {exported.kind}."
    )
    if not about.get("retained_experts"):
        return [text]
    kept = size_range([layer.num_experts for layer in config.layer_experts if not layer.is_dense])
    whole = size_range([size for size in about["root_experts_per_layer"] if size])
    return [
        text,
        "",
        f"It is a subset: {kept} of the {whole} experts of each layer. `conversion.json` says which, "
        "in the numbering of the whole model. It is good at texts like those that "
        "the experts were chosen for, and worse at others.",
    ]


def _in_transformers(name: str) -> list[str]:
    return [
        "",
        "Transformers reads it too, with the config beside it:",
        "",
        "```python",
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "",
        f'config = AutoConfig.from_pretrained("{name}")',
        "model = AutoModelForCausalLM.from_pretrained(",
        f'    "{name}", gguf_file="{name}.gguf", config=config, dtype=config.dtype',
        ")",
        "```",
    ]


def _how_to_run(exported: Exported) -> list[str]:
    name = exported.name
    if exported.to == "gguf":
        return [
            "```sh",
            f"llama-server -m {name}.gguf",
            f"llama-cli -m {name}.gguf -p 'The'",
            "# fewer bits, by llama.cpp's own quantiser",
            f"llama-quantize {name}.gguf {name}-Q4_K_M.gguf Q4_K_M",
            "# Ollama",
            f"printf 'FROM ./{name}.gguf' > Modelfile",
            f"ollama create {name} -f Modelfile && ollama run {name}",
            "```",
            *([] if exported.shape.dense else _in_transformers(name)),
        ]
    if exported.to == "deepseek":
        also = [] if exported.shape.always else [f"mlx_lm.generate --model {name} --prompt 'The'"]
        return ["```sh", f"vllm serve {name} --trust-remote-code", *also, "```"]
    lines = ["```sh", f"vllm serve {name}"]
    rope: Any = exported.config.rope_parameters or {}
    if not exported.shape.dense and rope.get("rope_type", "default") == "default":
        lines += [f"mlx_lm.generate --model {name} --prompt 'The'"]
        lines += [f"python -m sglang.launch_server --model-path {name}"]
    return [
        *lines,
        "```",
        "",
        "In Transformers it is `AutoModelForCausalLM.from_pretrained`, without any other package. Whoever "
        "trains it keeps `shared_expert_gate` and the biases of attention as they are, so that it can become "
        "an EMO again: `emo export FOLDER OUT --from qwen2-moe`.",
    ]
