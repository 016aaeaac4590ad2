"""Load, save and push models as Transformers does: also in part, with adapters, and with their code."""

import os
import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from .expert_switching import ExpertSwitching, check_layers
from .package_hooks import NEEDS_PACKAGE, package
from .paged_experts import HINT
from .parallel import check_distribution, refuse_in_pipeline
from .transformers_differences import EP_ROUTER_PLAN, check_peft

# The classes that a saved config.json points to, in the files written by `save_code`.
AUTO_MAP = {
    "AutoConfig": "configuration_emo.EmoConfig",
    "AutoModel": "modeling_emo.EmoModel",
    "AutoModelForCausalLM": "modeling_emo.EmoForCausalLM",
    "AutoModelForSequenceClassification": "modeling_emo.EmoForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_emo.EmoForTokenClassification",
}

_PACKAGE = Path(__file__).resolve().parents[1]
_FILES = [
    "configuration/config_checks.py",
    "configuration/configuration_emo.py",
    "configuration/layer_experts.py",
    "imports/names_of_others.py",
    "imports/transformers_versions.py",
    "modeling_emo/expert_switching.py",
    "modeling_emo/forward_inputs.py",
    "modeling_emo/generation.py",
    "modeling_emo/in_use/routed_experts.py",
    "modeling_emo/losses.py",
    "modeling_emo/modeling_emo.py",
    "modeling_emo/package_hooks.py",
    "modeling_emo/paged_experts.py",
    "modeling_emo/parallel.py",
    "modeling_emo/pools/cache_layer.py",
    "modeling_emo/pools/document_pool.py",
    "modeling_emo/pools/moving_pools.py",
    "modeling_emo/pools/pool_sizes.py",
    "modeling_emo/pools/prompt_pool.py",
    "modeling_emo/pools/segments.py",
    "modeling_emo/pretrained.py",
    "modeling_emo/transformers_differences.py",
    "modeling_emo/weight_names.py",
]
# Their names in the folder of a saved model.
CODE_FILES = [Path(name).name for name in _FILES]
# `push_to_hub(include_code=True)` says so to the `save_pretrained` that Transformers calls within it.
_with_code: ContextVar[bool] = ContextVar("with_code", default=False)


class PartialModel(ExpertSwitching, PreTrainedModel):
    """A model of Transformers that may hold part of its experts.

    Example: see `PartialModel.from_pretrained`.
    """

    # Of the decoder alone: what `expert_memory` loaded in place of its experts.
    _expert_memory: Any = None

    @property
    def expert_memory(self) -> Any:
        """`ExpertMemory`, *optional*: where the experts are that come into memory when they are taken.

        `None` for a model loaded without `expert_memory`.
        """
        return self.base_model._expert_memory

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        expert_subset=None,
        exclude_experts=None,
        ignore_missing_keys: bool = False,
        check_weights: bool = False,
        expert_memory: int | str | None = None,
        **kwargs,
    ):
        """Load a model, all of it or a subset of its experts; see `PreTrainedModel.from_pretrained`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub repository.
            expert_subset (`ExpertSubset`, path, `dict` or list of lists, *optional*): the experts to load.
                Only their bytes are read; they are renumbered, the router rows are cut to them and the result
                is a smaller, stand-alone model.
            exclude_experts (*optional*): experts not to load, of those or of all; as in `use_experts`.
            ignore_missing_keys (`bool`, defaults to `False`): fill parameters that the files lack with random
                numbers, as other models of Transformers do. By default they are refused by name, other than
                those of a head that the saved model did not have. With `output_loading_info=True` they are
                not refused either: the caller is told their names. Experts and routers of a subset must be
                there.
            check_weights (`bool`, defaults to `False`): look at every weight that was loaded, and refuse NaN
                and infinite ones by the name of their tensor. It reads all weights once more, in memory.
            expert_memory (`int` or `str`, *optional*): bytes, or a string such as `"6GB"`, for experts that
                are in memory at a time. The others stay in the files, or on the Hub, and are read when a
                token takes them; those that were not used for longest make room. The rest of the model and
                the experts that every token uses are beside this budget. Outputs are those of the whole
                model. For inference only. `model.expert_memory.report()` tells what was read.
            args, kwargs: as for every Transformers model. With `disable_mmap=False` large weights stay pages
                of their files (on Linux): a page is read when it is first used, so that a token reads its own
                experts; pages are shared between processes, and somewhat slower to compute with. Such a file
                may be replaced, but if it is written to in place or the disk fails, the process may end. By
                default, and with `True`, weights are read.

        Raises:
            SubsetError: if the subset does not fit the model; before any tensor is read.
            CheckpointError: if a file is missing, damaged or outside the folder, by its path or by a link;
                if the files lack a parameter, or one has another shape: before any tensor is read. With
                `check_weights`, if a weight is NaN or infinite.
            ValueError: if `expert_memory` is too small for the experts of one token, or given with what does
                not go with it.
            ImportError: if a subset, an exclusion, `expert_memory` or `check_weights` is given and this file
                is used without the `transformers_emo` package.

        Example:

        ```python
        >>> from transformers_emo import EmoForCausalLM
        >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 1, 2, 31]] * 4)
        >>> model.config.num_experts
        4

        ```
        """
        load = super().from_pretrained
        if (hooks := package.hooks) is not None:
            kwargs |= {"ignore_missing_keys": ignore_missing_keys, "check_weights": check_weights}
            if expert_memory is not None:
                kwargs["expert_memory"] = expert_memory
            subset = {"expert_subset": expert_subset, "exclude_experts": exclude_experts}
            return hooks.from_pretrained(load, cls, pretrained_model_name_or_path, *args, **subset, **kwargs)
        chosen = (expert_subset, exclude_experts, expert_memory)
        if any(each is not None for each in chosen) or check_weights:
            raise ImportError(NEEDS_PACKAGE)
        return load(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        load = PreTrainedModel._load_pretrained_model
        if (hooks := package.hooks) is not None:
            return hooks.load_weights(load, model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def init_parallel_plans(self):
        """The plans of the config, under the names of this version of Transformers."""
        super().init_parallel_plans()
        if self.base_model is self:
            self._ep_plan = {**(self._ep_plan or {}), **EP_ROUTER_PLAN}

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh):
        """Share a model among processes; see `PreTrainedModel`. What cannot be computed so is refused."""
        if mesh is not None:
            check_distribution(model.config, distributed_config)
        model = super().maybe_distribute_model(model, distributed_config, mesh)
        if mesh is not None and distributed_config.pp_size > 1:
            model.register_forward_pre_hook(refuse_in_pipeline, with_kwargs=True)
        return model

    def _refuse_paged(self, what: str) -> None:
        if self.expert_memory is not None:
            raise ValueError(
                f"A model loaded with `expert_memory` {what}: its experts are in the files that it was "
                f"loaded from. {HINT}."
            )

    def train(self, mode: bool = True):
        """Set the mode as every module does.

        Args:
            mode (`bool`, defaults to `True`): training, or evaluation.

        Raises:
            ValueError: with `expert_memory`, which is for inference only.

        Example:

        ```python
        >>> from transformers_emo import EmoForCausalLM
        >>> EmoForCausalLM.from_pretrained("model_cards/toy-emo").train().training
        True

        ```
        """
        if mode:
            self._refuse_paged("cannot be trained")
        return super().train(mode)

    def __setattr__(self, name, value):
        # PEFT shows the adapters that it puts on a model to it in this way alone.
        if name == "peft_config":
            self._refuse_paged("takes no adapters")
        if name == "peft_config" and package.hooks is not None:
            package.hooks.check_adapters(value, self.config)
        super().__setattr__(name, value)

    def add_adapter(self, adapter_config, *args, **kwargs):
        """Put a new PEFT adapter on the model; see `PreTrainedModel.add_adapter`.

        Args:
            adapter_config (`peft.PeftConfig`): mostly from `transformers_emo.training.lora_config`.
            args, kwargs: as for every Transformers model.

        Raises:
            SubsetError: if `lora_config` made it for a model with other experts.
            ImportError: if this Transformers wants a newer PEFT.

        Example: see `load_adapter`.
        """
        self._refuse_paged("takes no adapters")
        if package.hooks is not None:
            package.hooks.check_adapter_config(adapter_config, self.config)
        check_peft()
        return super().add_adapter(adapter_config, *args, **kwargs)

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """Put a PEFT adapter on the model; see `PreTrainedModel.load_adapter`.

        Args:
            peft_model_id (`str` or `os.PathLike`, *optional*): the adapter's folder or Hub repository.
            args, kwargs: as for every Transformers model.

        Raises:
            SubsetError: if the adapter is known to be trained on other experts than the model holds; before
                anything is loaded. `transformers_emo.training.load_adapter` fits it to a larger model.

        Example:

        ```python
        >>> from peft import get_peft_model
        >>> from transformers_emo import EmoForCausalLM
        >>> from transformers_emo.training import lora_config
        >>> path, subset = "model_cards/toy-emo", [[0, 1, 2, 31]] * 4
        >>> model = EmoForCausalLM.from_pretrained(path, expert_subset=subset)
        >>> adapted = get_peft_model(model, lora_config(model, r=2, target_modules=["q_proj"]))
        >>> adapted.save_pretrained(tmp_path)
        >>> _ = EmoForCausalLM.from_pretrained(path, expert_subset=subset).load_adapter(tmp_path)

        ```
        """
        self._refuse_paged("takes no adapters")
        load = super().load_adapter
        if package.hooks is not None:
            return package.hooks.load_checked_adapter(load, self.config, peft_model_id, *args, **kwargs)
        return load(peft_model_id, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, include_code: bool = False, **kwargs):
        """Save the model in the released layout; see `PreTrainedModel.save_pretrained`.

        A part of a model, loaded with `expert_subset`, takes the tokenizer of that model along, unless the
        folder has one: what is saved works in a `pipeline`.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            include_code (`bool`, defaults to `False`): write the modelling code beside the weights, so that
                people without this package can load the model with `trust_remote_code=True` on Transformers
                5.
            args, kwargs: as for every Transformers model.

        Raises:
            ValueError: if the model is a stage of a pipeline (`pp_size`), which has a part of the layers; or
                if the code is asked for of a quantised model, which it cannot read.

        Example:

        ```python
        >>> from transformers_emo import EmoForCausalLM
        >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
        >>> model.save_pretrained(tmp_path, include_code=True)

        ```
        """
        self._refuse_paged("cannot be saved")
        check_layers(self.base_model)
        stages = getattr(getattr(self.config, "distributed_config", None), "pp_size", None) or 1
        if stages > 1:
            raise ValueError(
                f"Each of the {stages} processes of a pipeline has a part of the layers, and what one saved "
                "would lack the others: load the model without `pp_size` to save it."
            )
        include_code = include_code or _with_code.get()
        with_code = include_code and not self.is_remote_code()  # which Transformers saves again by itself
        if with_code and getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(
                "`include_code=True` saves code that cannot read quantised weights: leave it out, or save "
                "the model before it is quantised."
            )
        if with_code:
            save_code(save_directory)
            self.config.auto_map = AUTO_MAP
        try:
            result = super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if with_code:
                self.config.auto_map = {}
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if package.hooks is not None and is_main_process:
            package.hooks.copy_tokenizer(self, save_directory)
        return result

    def push_to_hub(self, repo_id: str, *, include_code: bool = False, **kwargs):
        """Push the model to the Hub in the released layout; see `PreTrainedModel.push_to_hub`.

        With the tokenizer, as in `save_pretrained`, unless the repository has one.

        Args:
            repo_id (`str`): the repository, `user/name`; made if need be.
            include_code (`bool`, defaults to `False`): push the modelling code too, as in `save_pretrained`.
            kwargs: as for every Transformers model.

        Example:

        ```python
        >>> from transformers_emo import EmoForCausalLM
        >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
        >>> model.push_to_hub("me/emo", include_code=True, token="hf_...")  # doctest: +SKIP

        ```
        """
        self._refuse_paged("cannot be saved")
        token = _with_code.set(include_code)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            _with_code.reset(token)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):
        # `save_pretrained(include_code=True, push_to_hub=True)` writes the code before Transformers notes
        # what the folder holds already: it would pass for old and be left out.
        if getattr(self.config, "auto_map", None):
            files_timestamps = {name: t for name, t in files_timestamps.items() if name not in CODE_FILES}
        if (hooks := package.hooks) is not None:
            hooks.complete_card(f"{working_dir}/README.md", self.config, repo_id)
            where = {name: kwargs.get(name) for name in ("revision", "token")}
            files_timestamps = hooks.tokenizer_to_push(self, working_dir, repo_id, files_timestamps, **where)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


def save_code(folder: str | os.PathLike) -> list[Path]:
    """Write the files that define the network into `folder`, side by side, as Transformers wants remote code.

    Args:
        folder (`str` or `os.PathLike`): the folder, made if need be.

    Returns:
        `list[Path]`: the files written.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.pretrained import save_code
    >>> sorted(path.name for path in save_code(tmp_path))[2]
    'configuration_emo.py'

    ```
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for name in _FILES:
        source = (_PACKAGE / name).read_text(encoding="utf-8")
        flat = re.sub(r"^from \.+(?:\w+\.)*(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
        target = Path(folder) / Path(name).name
        target.write_text(flat, encoding="utf-8")
        written.append(target)
    return written
