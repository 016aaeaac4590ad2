"""What EMO uses of other packages and nobody promises, with the reason: `transformers_versions` looks at it.

What `configuration` uses is listed under `network`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """Something of another package that EMO relies on and nobody promises.

    Args:
        name (`str`): the module, a colon, and the name in it, such as `"package.module:Class.method"`.
        why (`str`): what EMO does with it.
        first (`str`): its first parameters, in their order, `self` and `cls` left out; `*` for any name.
        takes (`str`): parameters, or attributes of a class, that it must have wherever they stand.
        mentions (`str`): what its code must call or read: EMO overrides or sets that.

    Example: see `check_names`.
    """

    name: str
    why: str
    first: str = ""
    takes: str = ""
    mentions: str = ""

    @property
    def package(self) -> str:
        """The package it is of."""
        return self.name.partition(".")[0].partition(":")[0]


_MODELS = "transformers.modeling_utils:PreTrainedModel"
_FLEX = "transformers.models.flex_olmo.modeling_flex_olmo"
_GENERATION = "transformers.generation.utils:GenerationMixin"
_SAMPLE, _BEAMS = f"{_GENERATION}._sample", f"{_GENERATION}._beam_search"
_TRAINER = "transformers.trainer:Trainer"
_LOADING = "transformers.core_model_loading"
_TOKENIZER = "transformers.tokenization_utils_tokenizers:TokenizersBackend"

PRIVATE_NAMES: dict[str, list[PrivateName]] = {
    "network": [
        PrivateName("transformers.activations:ACT2FN", "the activation that the config names"),
        PrivateName("transformers.initialization:trunc_normal_", "initialises", takes="mean std a b"),
        PrivateName("transformers.initialization:zeros_", "initialises"),
        PrivateName("transformers.loss.loss_utils:ForCausalLMLoss", "tells a loss of the user's own"),
        PrivateName("transformers.processing_utils:Unpack", "types"),
        PrivateName("transformers.utils:TransformersKwargs", "types"),
        PrivateName("transformers.utils:ModelOutput", "tells outputs"),
        PrivateName("transformers.utils:can_return_tuple", "outputs as tuples, where asked for"),
        PrivateName("transformers.utils.generic:is_flash_attention_requested", "masks or lengths", "config"),
        PrivateName("transformers.utils.generic:merge_with_config_defaults", "settings left out of a call"),
        PrivateName("transformers.utils.output_capturing:OutputRecorder", "router logits", takes="index"),
        PrivateName("transformers.utils.output_capturing:capture_outputs", "hidden states and router logits"),
        PrivateName(
            "transformers.masking_utils:create_causal_mask",
            "the mask of the attention",
            "config inputs_embeds attention_mask *",
            "position_ids and_mask_function",
        ),
        PrivateName("transformers.masking_utils:packed_sequence_mask_function", "keeps documents apart", "*"),
        PrivateName("transformers.modeling_layers:GradientCheckpointingLayer", "the base of a layer"),
        PrivateName("transformers.modeling_layers:GenericForSequenceClassification.forward", "a head"),
        PrivateName("transformers.modeling_layers:GenericForTokenClassification.forward", "a head"),
        PrivateName(
            "transformers.modeling_outputs:MoeModelOutputWithPast",
            "the output",
            takes="last_hidden_state hidden_states attentions router_logits",
        ),
        PrivateName(
            "transformers.modeling_outputs:MoeCausalLMOutputWithPast",
            "the output",
            takes="loss aux_loss logits hidden_states attentions router_logits",
        ),
        PrivateName(
            "transformers.cache_utils:Cache", "keys and values of the tokens before", takes="get_seq_length"
        ),
        PrivateName("transformers.cache_utils:Cache.update", "the same", "key_states value_states layer_idx"),
        PrivateName("transformers.cache_utils:Cache.is_compileable", "tells a static cache"),
        PrivateName("transformers.cache_utils:Cache.reorder_cache", "pools are reordered", mentions="layers"),
        PrivateName(
            "transformers.generation.continuous_batching.cache:PagedAttentionCache.update",
            "the cache of continuous batching",
            "key_states value_states layer_idx",
        ),
        PrivateName(
            "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface",
            "attention implementations",
            "attn_implementation default",
        ),
        PrivateName(f"{_MODELS}._init_weights", "initialisation is overridden", "module"),
        PrivateName(f"{_MODELS}._initialize_weights", "the same", mentions="_init_weights"),
        PrivateName(
            f"{_MODELS}._can_set_experts_implementation",
            "reads the source of the network: experts have to be decorated in that file",
        ),
        PrivateName(
            f"{_MODELS}.get_correct_experts_implementation",
            "the package's experts are the default",
            "requested_experts",
        ),
        PrivateName(
            f"{_MODELS}._check_and_adjust_experts_implementation",
            "the same",
            mentions="get_correct_experts_implementation",
        ),
        PrivateName(f"{_MODELS}.set_experts_implementation", "decoding on a GPU", "*"),
        PrivateName(
            _MODELS,
            "what a model says of itself",
            takes="_no_split_modules _skip_keys_device_placement _supports_flash_attn _supports_sdpa "
            "_supports_flex_attn _supports_attention_backend _can_compile_fullgraph _can_record_outputs "
            "_keys_to_ignore_on_load_unexpected _keys_to_ignore_on_load_missing _tied_weights_keys "
            "_tp_plan _pp_plan _fsdp_plan config_class base_model_prefix supports_gradient_checkpointing "
            "is_remote_code _hf_peft_config_loaded",
        ),
        PrivateName(f"{_MODELS}.init_parallel_plans", "plans of other versions", mentions="_ep_plan"),
        PrivateName(
            f"{_MODELS}.maybe_distribute_model", "refuses what cannot be shared", "model distributed_config *"
        ),
        PrivateName(f"{_MODELS}.from_pretrained", "the same", mentions="maybe_distribute_model"),
        PrivateName(
            "transformers.distributed.configuration_utils:DistributedConfig",
            "the same",
            takes="tp_size tp_plan pp_size enable_expert_parallel",
        ),
        PrivateName(
            "transformers.integrations.tensor_parallel:ALL_PARALLEL_STYLES", "tells versions by their plans"
        ),
        PrivateName(
            "transformers.configuration_utils:PreTrainedConfig",
            "settings of a model in use",
            takes="_attn_implementation _experts_implementation attribute_map "
            "base_model_tp_plan base_model_pp_plan base_model_ep_plan validate __post_init__",
        ),
        PrivateName("transformers.modeling_rope_utils:RopeParameters", "types of the config"),
        PrivateName("transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS", "kinds of rotary embedding"),
        PrivateName("huggingface_hub.dataclasses:strict", "types of the config are checked"),
        PrivateName("transformers.integrations:use_experts_implementation", "experts implementations"),
        PrivateName("transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS.register", "the same", "key value"),
        PrivateName(
            "transformers.integrations.moe:grouped_mm_experts_forward",
            "where the package's own experts cannot run",
            "self hidden_states top_k_index top_k_weights",
        ),
        PrivateName(f"{_FLEX}:FlexOlmoAttention", "attention", "config layer_idx"),
        PrivateName(
            f"{_FLEX}:FlexOlmoAttention.forward",
            "attention is overridden",
            "hidden_states position_embeddings attention_mask",
        ),
        PrivateName(f"{_FLEX}:FlexOlmoRMSNorm", "the norm", "hidden_size eps"),
        PrivateName(f"{_FLEX}:FlexOlmoRMSNorm.forward", "the norm is overridden", "hidden_states"),
        PrivateName(f"{_FLEX}:FlexOlmoRotaryEmbedding", "positions", "config"),
        PrivateName(f"{_FLEX}:FlexOlmoRotaryEmbedding.forward", "positions", "x position_ids"),
        PrivateName(f"{_FLEX}:apply_rotary_pos_emb", "positions", "q k cos sin"),
        PrivateName(
            f"{_FLEX}:eager_attention_forward",
            "attention without a kernel",
            "module query key value attention_mask",
            "scaling dropout",
        ),
        PrivateName(
            "transformers.conversion_mapping:register_checkpoint_conversion_mapping",
            "names on disk",
            "* mapping",
            "overwrite",
        ),
        PrivateName(
            "transformers.conversion_mapping:_MODEL_TO_CONVERSION_PATTERN",
            "PEFT finds the experts by the names of another model's",
        ),
        PrivateName(f"{_LOADING}:Concatenate", "names on disk", takes="dim"),
        PrivateName(f"{_LOADING}:MergeModulelist", "names on disk", takes="dim"),
        PrivateName(
            f"{_LOADING}:WeightConverter", "names on disk", takes="source_patterns target_patterns operations"
        ),
        PrivateName(f"{_LOADING}:WeightRenaming", "names on disk"),
        PrivateName(
            f"{_GENERATION}.prepare_inputs_for_generation",
            "tells the network of pools to choose",
            "input_ids",
        ),
        PrivateName(
            _SAMPLE,
            "calls what is overridden",
            mentions="_prefill _optimize_model_for_decode _update_model_kwargs_for_generation",
        ),
        PrivateName(
            f"{_GENERATION}._update_model_kwargs_for_generation",
            "experts are handed on as soon as a forward has run",
            "outputs model_kwargs",
        ),
        PrivateName(_BEAMS, "calls what is overridden", mentions="_prefill"),
        PrivateName(
            f"{_GENERATION}._prefill",
            "pools are chosen from the whole prompt",
            "input_ids generation_config model_kwargs",
        ),
        PrivateName(f"{_GENERATION}._optimize_model_for_decode", "the package's experts step aside on a GPU"),
        PrivateName(
            f"{_GENERATION}.init_continuous_batching",
            "refuses pools, which it cannot keep",
            "generation_config",
        ),
        PrivateName(
            f"{_MODELS}._load_pretrained_model",
            "reads chosen experts, and all of them without a copy",
            "model state_dict checkpoint_files load_config",
        ),
        PrivateName(f"{_MODELS}.from_pretrained", "the same", mentions="_load_pretrained_model"),
        PrivateName(
            f"{_MODELS}._upload_modified_files",
            "uploads code and a card along with the weights",
            "working_dir repo_id files_timestamps",
        ),
        PrivateName(f"{_MODELS}.save_pretrained", "the same", mentions="_upload_modified_files"),
        PrivateName(
            "transformers.integrations.peft:MIN_PEFT_VERSION", "what Transformers' own adapters wait for"
        ),
    ],
    "auto models": [
        PrivateName(
            "transformers.models.auto.modeling_auto:AutoModel._model_mapping._extra_content",
            "the network is imported when a model is asked for",
        ),
    ],
    "auto tokenizer": [
        PrivateName(
            "transformers.models.auto.tokenization_auto:TOKENIZER_MAPPING_NAMES",
            "repositories that name another class get `EmoTokenizer`",
        ),
        PrivateName(
            "transformers.models.auto.tokenization_auto:MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS",
            "the same",
        ),
        PrivateName(
            "transformers.models.auto.tokenization_auto:AutoTokenizer.from_pretrained",
            "the same",
            mentions="MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS",
        ),
    ],
    "auto experts": [
        PrivateName(
            "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS.register",
            "the package's own experts implementation",
            "key value",
        ),
    ],
    "tokenizer": [
        PrivateName(_TOKENIZER, "the base of the tokenizer", takes="vocab_files_names model_input_names"),
        PrivateName(f"{_TOKENIZER}.__init__", "keeps our backend", mentions="_tokenizer"),
        PrivateName(
            f"{_TOKENIZER}._save_pretrained",
            "saves under a class that other tools know",
            "save_directory file_names legacy_format filename_prefix",
        ),
        PrivateName(f"{_TOKENIZER}.convert_to_native_format", "a tokenizer.json needs no conversion"),
        PrivateName(
            "transformers.tokenization_utils_base:PreTrainedTokenizerBase.save_pretrained",
            "calls what is overridden",
            mentions="_save_pretrained",
        ),
    ],
    "chats": [
        PrivateName(
            "transformers.utils.chat_template_utils:render_jinja_template",
            "where an answer begins in a chat",
            takes="conversations chat_template return_assistant_tokens_mask",
        ),
    ],
    "loading": [
        PrivateName(
            "transformers.modeling_utils:LoadStateDictConfig",
            "where weights go to",
            takes="device_map hf_quantizer weight_mapping disable_mmap download_kwargs "
            "ignore_mismatched_sizes",
        ),
        PrivateName(
            "transformers.utils.loading_report:LoadStateDictInfo",
            "what weights lack",
            takes="missing_keys mismatched_keys error_msgs conversion_errors",
        ),
        PrivateName(
            "transformers.modeling_utils:PreTrainedModel.post_init",
            "tied weights are one tensor",
            mentions="all_tied_weights_keys",
        ),
        PrivateName(f"{_LOADING}:WeightConverter.was_used", "saving takes the experts apart again"),
        PrivateName(
            f"{_LOADING}:revert_weight_conversion", "the same", "model", mentions="_weight_conversions"
        ),
        PrivateName(
            "transformers.integrations.peft:maybe_load_adapters",
            "the model that an adapter belongs to",
            "pretrained_model_name_or_path download_kwargs",
        ),
        PrivateName(
            "transformers.generation.utils:GenerationMixin.adjust_generation_fn",
            "the generation config, after weights that came without a path",
            "generation_config from_auto_class from_pipeline pretrained_model_name_or_path",
            "cache_dir force_download proxies local_files_only token revision subfolder trust_remote_code",
        ),
        PrivateName("transformers.integrations:is_deepspeed_zero3_enabled", "leaves the files to DeepSpeed"),
        PrivateName(f"{_MODELS}._load_pretrained_model", "the same", mentions="is_deepspeed_zero3_enabled"),
        PrivateName("transformers.utils:SAFE_WEIGHTS_NAME", "the name of a file"),
        PrivateName("transformers.utils:SAFE_WEIGHTS_INDEX_NAME", "the name of a file"),
    ],
    "hub": [
        PrivateName("transformers.utils.hub:extract_commit_hash", "the commit of a file", "* commit_hash"),
        PrivateName("transformers.utils:cached_file", "files beside the weights", "* filename"),
        PrivateName("transformers.utils.hub:cached_files", "whole files", "* filenames"),
        PrivateName("huggingface_hub.file_download:repo_folder_name", "folders", takes="repo_id repo_type"),
        PrivateName("huggingface_hub.utils:build_hf_headers", "requests", takes="token library_name"),
        PrivateName("huggingface_hub.utils:hf_raise_for_status", "errors of requests", "response"),
        PrivateName(
            "huggingface_hub.utils:http_stream_backoff",
            "requests for parts of files",
            "method url",
            "retry_on_exceptions",
        ),
        PrivateName("huggingface_hub.utils:httpx.HTTPError", "errors of requests"),
        PrivateName("huggingface_hub.utils:httpx.SyncByteStream", "bodies of answers"),
        PrivateName("huggingface_hub.utils:httpx.TransportError", "errors of requests"),
        PrivateName("huggingface_hub.utils:tqdm", "the progress bar of the Hub"),
        PrivateName("huggingface_hub.utils:validate_repo_id", "tells names of repositories", "repo_id"),
        PrivateName("huggingface_hub:get_hf_file_metadata", "size, etag and place", takes="retry_on_errors"),
    ],
    "model files": [
        PrivateName(
            "huggingface_hub.serialization._base:parse_size_to_int",
            "sizes such as '5GB', as `save_pretrained` reads them",
            "size_as_str",
        ),
    ],
    "shares of a stream": [
        PrivateName(
            "accelerate.data_loader:prepare_data_loader",
            "puts batches on the device, and skips those trained on",
            "dataloader device num_processes process_index",
            "put_on_device dispatch_batches",
        ),
    ],
    "quantisation": [
        PrivateName(
            "transformers.utils.quantization_config:QuantizationConfigMixin", "the base of `PackedConfig`"
        ),
    ],
    "quantiser": [
        PrivateName("transformers.quantizers.auto:AUTO_QUANTIZER_MAPPING", "whether it is registered"),
        PrivateName("transformers.quantizers.auto:register_quantization_config", "registers", "method"),
        PrivateName("transformers.quantizers.auto:register_quantizer", "the same", "name"),
        PrivateName(
            "transformers.quantizers.base:HfQuantizer",
            "the base of the quantiser",
            takes="get_state_dict_and_metadata is_serializable is_trainable is_qat_trainable dequantize",
        ),
        PrivateName(
            "transformers.quantizers.base:HfQuantizer.preprocess_model",
            "calls what is overridden",
            mentions="_process_model_before_weight_loading",
        ),
        PrivateName(
            "transformers.quantizers.base:HfQuantizer.postprocess_model",
            "the same",
            mentions="_process_model_after_weight_loading quantization_config",
        ),
        PrivateName(
            "transformers.quantizers.base:HfQuantizer.dequantize", "the same", mentions="_dequantize"
        ),
    ],
    "trainer": [
        PrivateName(f"{_TRAINER}._save_rng_state", "saves where a stream stands", "output_dir"),
        PrivateName(f"{_TRAINER}._save_checkpoint", "the same", mentions="_save_rng_state"),
        PrivateName(f"{_TRAINER}._load_optimizer_and_scheduler", "goes on from there", "checkpoint"),
        PrivateName(
            f"{_TRAINER}._prepare_for_training", "the same", mentions="_load_optimizer_and_scheduler"
        ),
        PrivateName(f"{_TRAINER}.get_train_dataloader", "a share of a stream", mentions="_train_batch_size"),
        PrivateName(
            _TRAINER,
            "the base of `EmoTrainer`",
            takes="train log get_tp_size get_cp_size get_sp_size",
        ),
        PrivateName(
            f"{_TRAINER}._run_epoch",
            "shares of a step",
            mentions="current_gradient_accumulation_steps get_batch_samples",
        ),
        PrivateName(
            f"{_TRAINER}.prediction_step", "predictions are logits", mentions="keys_to_ignore_at_inference"
        ),
        PrivateName(f"{_TRAINER}._prepare_inputs", "counts picks beforehand", "inputs"),
        PrivateName(f"{_TRAINER}.__init__", "refuses label smoothing", mentions="label_smoother"),
        PrivateName(f"{_TRAINER}.compute_loss", "a report", "model inputs return_outputs num_items_in_batch"),
        PrivateName(f"{_TRAINER}.training_step", "the same", mentions="compute_loss"),
        PrivateName(
            f"{_TRAINER}.get_batch_samples", "counts picks over a step", "epoch_iterator num_batches device"
        ),
        PrivateName(f"{_TRAINER}.get_decay_parameter_names", "the paper's groups of weight decay", "model"),
        PrivateName(f"{_TRAINER}.create_optimizer", "the same", mentions="get_decay_parameter_names"),
        PrivateName(
            f"{_TRAINER}.create_accelerator_and_postprocess", "shards on CPUs", mentions="is_fsdp_enabled"
        ),
        PrivateName("transformers.trainer_utils:PREFIX_CHECKPOINT_DIR", "finds checkpoints"),
        PrivateName(
            f"{_TRAINER}._save_checkpoint",
            "synchronises checkpoints",
            "model trial",
            mentions="save_to_json rotate_checkpoints save_total_limit",
        ),
        PrivateName(f"{_TRAINER}._get_output_dir", "the same", "trial"),
        PrivateName(
            "transformers.trainer_utils:rotate_checkpoints",
            "the same",
            "output_dir save_total_limit best_model_checkpoint use_mtime",
        ),
        PrivateName("transformers:TrainerState.save_to_json", "the same", "json_path"),
    ],
    "sharding on CPUs": [
        PrivateName(
            "accelerate.utils:FullyShardedDataParallelPlugin.set_mixed_precision", "shards on CPUs", "*"
        ),
        PrivateName("accelerate.utils:DistributedType.MULTI_CPU", "shards on CPUs"),
        PrivateName("accelerate.utils:DistributedType.FSDP", "shards on CPUs"),
    ],
    "harness": [
        PrivateName("lm_eval.tasks:TaskManager", "finds tasks", takes="include_path load task_index"),
        PrivateName(
            "lm_eval.evaluator:evaluate", "scores", "lm task_dict", "limit log_samples bootstrap_iters"
        ),
        PrivateName(
            "lm_eval.models.huggingface:HFLM",
            "a model as it wants it",
            takes="pretrained tokenizer batch_size",
        ),
        PrivateName(
            "lm_eval.api.task:ConfigurableTask.build_qa_turn",
            "prompts with their answers, as demonstrations are",
            takes="q c a gen_prefix tgt_delim few_delim",
        ),
        PrivateName("lm_eval.api.task:ConfigurableTask.build_all_requests", "what is asked", takes="limit"),
        PrivateName("lm_eval.api.task:ConfigurableTask.set_fewshot_seed", "the same demonstrations", "seed"),
    ],
    "peft": [
        PrivateName(
            "peft.utils.transformers_weight_conversion:_MODEL_TO_CONVERSION_PATTERN",
            "the experts are found by the names of another model's",
        ),
        PrivateName("peft:LoraConfig.to_dict", "what an adapter's file holds"),
        PrivateName("peft:LoraConfig.save_pretrained", "the experts are saved beside it", "save_directory"),
        PrivateName(
            "peft:LoraConfig", "they are named in it too", takes="auto_mapping task_type inference_mode"
        ),
        PrivateName(
            "peft.tuners.tuners_utils:BaseTuner.__init__",
            "it is shown to the model that it is put on",
            mentions="peft_config",
        ),
    ],
}
"""By who uses them. A name that two use stands with the one that is imported first."""
