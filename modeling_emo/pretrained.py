"""Loading, saving and pushing models: Transformers' own ways, with part of the experts, adapters and code."""

from functools import partial

from transformers.modeling_utils import PreTrainedModel

from .expert_switching import NEEDS_PACKAGE, ExpertServing
from .standalone import AUTO_MAP, CODE_FILES, save_code
from .transformers_differences import check_peft


class SharedModel(ExpertServing, PreTrainedModel):
    """A model of Transformers that may hold part of its experts.

    Example: see `SharedModel.from_pretrained`.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, expert_subset=None, exclude_experts=None, **kwargs
    ):
        """Load a model, all of it or a subset of its experts; see `PreTrainedModel.from_pretrained`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub repository.
            expert_subset (`ExpertSubset`, path, `dict` or list of lists, *optional*): the experts to load.
                Only their bytes are read; they are renumbered, the router rows are cut to them and the result
                is a smaller, stand-alone model.
            exclude_experts (*optional*): experts not to load, of those or of all; as in `use_experts`.
            args, kwargs: as for every Transformers model. With `disable_mmap=False` large weights stay pages
                of their files (on Linux): loaded at once if the system has these in memory, shared between
                processes, and somewhat slower to compute with. Such a file may be replaced but not written to
                in place while the model is used. By default, and with `True`, weights are read.

        Raises:
            SubsetError: if the subset does not fit the model; before any tensor is read.
            CheckpointError: if a file is missing, damaged or outside the folder; before any tensor is read.
            ImportError: if either is given and this file is used without the `transformers_emo`
                package.

        Example:

        ```python
        >>> from transformers_emo import EmoForCausalLM
        >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo", expert_subset=[[0, 1, 2, 31]] * 4)
        >>> model.config.num_experts
        4

        ```
        """
        load = super().from_pretrained
        if cls._package is not None:
            subset = {"expert_subset": expert_subset, "exclude_experts": exclude_experts}
            return cls._package.from_pretrained(
                load, cls, pretrained_model_name_or_path, *args, **subset, **kwargs
            )
        if expert_subset is not None or exclude_experts is not None:
            raise ImportError(NEEDS_PACKAGE)
        return load(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        load = PreTrainedModel._load_pretrained_model
        if model._package is not None:
            return model._package.load_weights(
                load, model, state_dict, checkpoint_files, load_config, *args, **kwargs
            )
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

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
        if self._package is not None:
            self._package.check_adapter_config(adapter_config, self.config)
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
        load = super().load_adapter
        if self._package is not None:
            return self._package.load_checked_adapter(load, self.config, peft_model_id, *args, **kwargs)
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

        Example:

        ```python
        >>> from transformers_emo import EmoForCausalLM
        >>> model = EmoForCausalLM.from_pretrained("model_cards/toy-emo")
        >>> model.save_pretrained(tmp_path, include_code=True)

        ```
        """
        with_code = include_code and not self.is_remote_code()  # which Transformers saves again by itself
        if with_code:
            save_code(save_directory)
            self.config.auto_map = AUTO_MAP
        try:
            result = super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if with_code:
                del self.config.auto_map
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if self._package is not None and is_main_process:
            self._package.copy_tokenizer(self, save_directory)
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
        if not include_code:
            return super().push_to_hub(repo_id, **kwargs)
        # Transformers calls `save_pretrained` with arguments of its own choice: it shall find this one.
        self.save_pretrained = partial(self.save_pretrained, include_code=True)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            del self.save_pretrained

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):
        # `save_pretrained(include_code=True, push_to_hub=True)` writes the code before Transformers notes
        # what the folder holds already: it would pass for old and be left out.
        if getattr(self.config, "auto_map", None):
            files_timestamps = {name: t for name, t in files_timestamps.items() if name not in CODE_FILES}
        if self._package is not None:
            self._package.complete_card(f"{working_dir}/README.md", self.config, repo_id)
            where = {name: kwargs.get(name) for name in ("revision", "token")}
            files_timestamps = self._package.tokenizer_to_push(
                self, working_dir, repo_id, files_timestamps, **where
            )
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)
