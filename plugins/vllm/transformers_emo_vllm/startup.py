"""What happens before a server starts: the subset is applied, what cannot be had is found out and said.

vLLM asks an architecture for changes to its settings through `VerifyAndUpdateConfig`, in the process that
takes requests. What is found out is written into the model's config, which goes to all other processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from . import TESTED, vllm_version
from .architecture import UnsupportedModelError, check_exact, layers_of
from .choice import ExpertChoiceError, Held, excluded, fitted, read_subset, without
from .config import EmoConfig, LegacyEmoConfig
from .files import ModelFiles, subset_of
from .requests import remember_server
from .weights import LOAD_FORMAT

logger = init_logger("vllm.emo")


class EmoStartup(VerifyAndUpdateConfig):
    """vLLM's settings for an EMO, checked and completed."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Apply the subset given at the start, and refuse what would not be exact."""
        config = model_config.hf_config
        check_exact(config)
        if model_config.quantization:
            raise UnsupportedModelError(
                f"--quantization {model_config.quantization} was not tested with EMO: leave it out."
            )
        if model_config.runner_type != "generate":
            raise UnsupportedModelError(
                f"EMO generates text: --runner {model_config.runner_type} is not possible."
            )
        apply_choice(config, ModelFiles(model_config.model, model_config.revision))

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Choose the loader, and note which choices requests may make."""
        config, load = vllm_config.model_config.hf_config, vllm_config.load_config
        if str(load.load_format) == "auto":
            load.load_format = LOAD_FORMAT
        elif str(load.load_format) not in (LOAD_FORMAT, "dummy"):
            raise UnsupportedModelError(
                f"--load-format {load.load_format} does not check that every expert is there: leave it out."
            )
        parallel = vllm_config.parallel_config
        for name in (
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "decode_context_parallel_size",
        ):
            if getattr(parallel, name, 1) > 1:
                raise UnsupportedModelError(
                    f"--{name.replace('_', '-')} was not tested with EMO: leave it out."
                )
        if parallel.enable_expert_parallel:
            raise UnsupportedModelError("--enable-expert-parallel was not tested with EMO: leave it out.")
        if vllm_config.lora_config is not None:
            raise UnsupportedModelError(
                "LoRA was not tested with EMO: merge the adapter into the model first."
            )
        version = vllm_version()
        if version not in TESTED:
            logger.warning(
                "EMO was tested with vLLM %s, and this is %s: compare a few answers with those of "
                "transformers-emo.",
                ", ".join(TESTED),
                version,
            )
        files = ModelFiles(
            vllm_config.model_config.model, vllm_config.model_config.revision, load.download_dir
        )
        refused = why_not(vllm_config)
        subsets, damaged = {}, {}
        held = Held.of(config)
        for name, path in files.library().items() if not refused else ():
            try:
                subsets[name] = [
                    None if ids is None else list(ids) for ids in library_subset(path, name, held)
                ]
            except ExpertChoiceError as error:
                damaged[name] = str(error)
        config.emo_serving = {
            "refused": refused,
            "pools_refused": why_no_pools(vllm_config),
            "subsets": subsets,
            "damaged": damaged,
        }
        remember_server(vllm_config)
        if refused:
            logger.info("EMO: requests cannot choose experts of their own here: %s", "; ".join(refused))
        else:
            logger.info("EMO: requests may choose their experts; %d subsets by name.", len(subsets))


class OtherNetwork(VerifyAndUpdateConfig):
    """vLLM's own network for Transformers' models, refused for an EMO."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse an EMO; other models are left alone."""
        if model_config.hf_config.model_type in (EmoConfig.model_type, LegacyEmoConfig.model_type):
            raise UnsupportedModelError(
                f"--model-impl {model_config.model_impl} computed other answers than EMO's: leave it out."
            )


def library_subset(path: Any, name: str, held: Held) -> tuple[tuple[int, ...] | None, ...]:
    """A subset of the library for requests: one that keeps all experts that every token uses.

    Args:
        path (`Path`): its file.
        name (`str`): its name.
        held (`Held`): what the model holds.

    Raises:
        ExpertChoiceError: if it does not fit.
    """
    subset = read_subset(path)
    if subset.drop_shared:
        raise ExpertChoiceError(
            f"The subset {name!r} may drop experts that every token uses. No request can ask for that: "
            "start a server "
            f'with it (--hf-overrides \'{{"expert_subset": "{name}"}}\').'
        )
    return fitted(subset, held, f"The subset {name!r}")


def apply_choice(config: Any, files: ModelFiles) -> None:
    """Make the config that of a subset, where `expert_subset` or `exclude_experts` is given at the start.

    Args:
        config: the model's config; changed.
        files (`ModelFiles`): the model's files.

    Raises:
        ExpertChoiceError: if there is no such subset, or it does not fit.

    Example:

    ```python
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> from transformers_emo_vllm.files import ModelFiles
    >>> from transformers_emo_vllm.startup import apply_choice
    >>> config = EmoConfig(num_hidden_layers=1, num_experts=8, num_experts_per_tok=2, expert_subset=[[1, 5,
    ...     7]])
    >>> apply_choice(config, ModelFiles(str(tmp_path)))
    >>> config.num_experts, config.emo_kept_experts
    (3, [[1, 5, 7]])

    ```
    """
    chosen, never = getattr(config, "expert_subset", None), getattr(config, "exclude_experts", None)
    if (chosen is None and never is None) or getattr(config, "emo_kept_experts", None) is not None:
        return
    held = Held.of(config)
    layers = held.layers
    kept: Any = [None if layer.is_dense else ids for layer, ids in zip(layers, held.present, strict=True)]
    if chosen is not None:
        kept = fitted(subset_of(chosen, files), held, f"The subset {str(chosen)[:60]!r}")
    if never is not None:
        kept = without(kept, excluded(never, held, files.subset), held)
    positions = [{root: e for e, root in enumerate(ids)} for ids in held.present]
    local = [[place[e] for e in ids or ()] for ids, place in zip(kept, positions, strict=True)]
    config.num_experts_per_layer = [len(ids) for ids in local]
    config.num_experts = max(config.num_experts_per_layer)
    config.num_shared_experts_per_layer = [
        sum(e >= layer.num_routed for e in ids) for layer, ids in zip(layers, local, strict=True)
    ]
    config.always_active_experts_per_layer = [
        [ids.index(e) for e in layer.always_active if e in ids]
        for layer, ids in zip(layers, local, strict=True)
    ]
    config.always_active_experts = None
    config.num_experts_per_tok = min(config.num_experts_per_tok, config.num_experts)
    config.retained_experts = [None if ids is None else list(ids) for ids in kept]
    config.root_experts_per_layer = list(held.root_sizes)
    config.emo_kept_experts = local
    layers_of(config)
    logger.info("EMO: %s experts a layer of %s.", sorted(set(map(len, local))), sorted(set(held.root_sizes)))


def why_not(vllm_config: Any) -> list[str]:
    """Why requests cannot choose experts of their own on a server; empty if they can.

    Args:
        vllm_config (`VllmConfig`): the server's settings.
    """
    reasons = []
    if vllm_config.cache_config.enable_prefix_caching:
        reasons.append(
            "keys and values of other experts would be taken from the cache (--no-enable-prefix-caching)"
        )
    if vllm_config.use_v2_model_runner:
        reasons.append("Model Runner V2 could not be tested without a GPU (VLLM_USE_V2_MODEL_RUNNER=0)")
    if vllm_config.speculative_config is not None:
        reasons.append(
            "vLLM leaves out the hook that says which request is in which row with speculative decoding"
        )
    if vllm_config.kv_transfer_config is not None:
        reasons.append("keys and values from other servers may be of other experts (no --kv-transfer-config)")
    mode = _graphs(vllm_config)
    if mode is None or mode.has_full_cudagraphs():
        reasons.append(
            "a full CUDA graph runs without asking which request is in which row "
            "(-cc.cudagraph_mode=PIECEWISE, "
            "or --enforce-eager)"
        )
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1:
        reasons.append("not tested with data parallelism (start several servers instead)")
    if getattr(parallel, "enable_dbo", False):
        reasons.append("batches are split in two (no --enable-dbo)")
    return reasons


def why_no_pools(vllm_config: Any) -> list[str]:
    """Why requests cannot have document pools on a server, beyond `why_not`; empty if they can.

    Args:
        vllm_config (`VllmConfig`): the server's settings.
    """
    from vllm.config import CUDAGraphMode

    reasons = []
    scheduler = vllm_config.scheduler_config
    if scheduler.enable_chunked_prefill or scheduler.long_prefill_token_threshold:
        reasons.append(
            "a pool is chosen from the whole prompt, which may be read in parts (--no-enable-chunked-prefill)"
        )
    if _graphs(vllm_config) != CUDAGraphMode.NONE:
        reasons.append(
            "a CUDA graph does not choose pools anew (-cc.cudagraph_mode=NONE, or --enforce-eager)"
        )
    if vllm_config.model_config.enable_prompt_embeds:
        reasons.append("prompts may come as embeddings (no --enable-prompt-embeds)")
    if any(layer.always_active for layer in layers_of(vllm_config.model_config.hf_config)):
        reasons.append("pools are not defined with always-active experts, which this model has")
    return reasons


def _graphs(vllm_config: Any) -> Any:
    """How a server uses CUDA graphs; `None` where vLLM has yet to choose, which may be full ones."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    if vllm_config.model_config.enforce_eager or current_platform.is_cpu():
        return CUDAGraphMode.NONE
    return vllm_config.compilation_config.cudagraph_mode


def check_promise(vllm_config: Any) -> None:
    """Check, where the network is made, that the server can do what requests were promised.

    vLLM completes its settings after it has asked `EmoStartup`.

    Args:
        vllm_config (`VllmConfig`): the server's settings.

    Raises:
        UnsupportedModelError: if it cannot.
    """
    serving = vllm_config.model_config.hf_config.emo_serving
    changed = [] if serving["refused"] else why_not(vllm_config)
    if not serving["refused"] and not serving["pools_refused"]:
        changed += why_no_pools(vllm_config)
    if changed:
        raise UnsupportedModelError(
            "Requests were promised a choice of experts, and then vLLM changed its settings: "
            f"{'; '.join(changed)}."
        )


def register_startup(architectures: Sequence[str]) -> None:
    """Have vLLM ask `EmoStartup` about models of these architectures.

    Args:
        architectures (`Sequence[str]`): names as in `config.json`.

    Example:

    ```python
    >>> from transformers_emo_vllm.startup import register_startup
    >>> register_startup(["EmoForCausalLM"])

    ```
    """
    for name in architectures:
        MODELS_CONFIG_MAP[name] = EmoStartup
    for name in ("TransformersForCausalLM", "TransformersMoEForCausalLM"):
        MODELS_CONFIG_MAP.setdefault(name, OtherNetwork)
