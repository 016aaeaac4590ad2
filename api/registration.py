"""The one place where EMO joins Transformers.

Each part is registered when the module of Transformers that takes it is imported: importing them, or EMO's
network, takes ten times as long as the rest of this package and is left to those who use them. The functions
below run in the midst of that import, so they import little and wait for nobody: configuration, tokenizer and
kernels, but no network.
"""

from __future__ import annotations

import importlib
import sys
from collections import UserDict
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import transformers_emo_autoload
from transformers_emo.imports.lazy_imports import import_name
from transformers_emo.imports.transformers_versions import check_names

from .import_hook import AfterImport
from .transformers_names import name_classes

if TYPE_CHECKING:
    from transformers_emo.modeling_emo.package_hooks import PackageHooks
    from transformers_emo.subsets.loading import model_hooks

    _checked: PackageHooks = model_hooks  # by the type checker: it has every function, as it is called

_NETWORK = f"{__package__}.modeling_emo.modeling_emo"
_HOOKS = f"{__package__}.subsets.loading.model_hooks"


def register() -> None:
    """Register EMO with the auto-classes. Done on import; calling it again changes nothing.

    Example:

    ```python
    >>> from transformers_emo.registration import register
    >>> register()

    ```
    """
    _HOOK.install()


def _register_configs(configuration_auto: ModuleType) -> None:
    from transformers_emo.configuration import EmoConfig, LegacyEmoConfig

    for config in (EmoConfig, LegacyEmoConfig):
        configuration_auto.AutoConfig.register(config.model_type, config, exist_ok=True)
    name_classes()


def _register_models(modeling_auto: ModuleType) -> None:
    from transformers_emo.configuration import EmoConfig

    check_names("auto models")
    for auto_class, name in (
        (modeling_auto.AutoModel, "EmoModel"),
        (modeling_auto.AutoModelForCausalLM, "EmoForCausalLM"),
        (modeling_auto.AutoModelForSequenceClassification, "EmoForSequenceClassification"),
        (modeling_auto.AutoModelForTokenClassification, "EmoForTokenClassification"),
    ):
        mapping = auto_class._model_mapping
        if not isinstance(mapping._extra_content, _ImportedOnAccess):
            mapping._extra_content = _ImportedOnAccess(mapping._extra_content)
        auto_class.register(EmoConfig, partial(import_name, _NETWORK, name), exist_ok=True)


class _ImportedOnAccess(UserDict):
    """What was registered with an auto-class, by config; a class that is yet to be imported is a `partial`.

    Transformers imports its own models on access too, but only those in its own folder.
    """

    def __getitem__(self, config: Any) -> Any:
        value = self.data[config]
        if isinstance(value, partial):
            value = self.data[config] = value()
        return value


def _register_tokenizer(tokenization_auto: ModuleType) -> None:
    from transformers_emo.configuration import EmoConfig
    from transformers_emo.tokenization import EmoTokenizer

    check_names("auto tokenizer")
    tokenization_auto.AutoTokenizer.register(EmoConfig, EmoTokenizer, exist_ok=True)
    # Registered alone, the class would serve only repositories that name none. Released ones may name
    # `GPT2Tokenizer`, which in Transformers 5 splits text as GPT-2 does, not as their `tokenizer.json` says.
    # This is how Transformers itself lists the models whose repositories name a wrong class.
    tokenization_auto.TOKENIZER_MAPPING_NAMES[EmoConfig.model_type] = EmoTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(EmoConfig.model_type)


def _register_experts(moe: ModuleType) -> None:
    from transformers_emo.modeling_emo.kernels.expert_kernels import (
        emo_experts_forward,
        sorted_experts_forward,
    )

    check_names("auto experts")
    moe.ALL_EXPERTS_FUNCTIONS.register("emo", emo_experts_forward)
    moe.ALL_EXPERTS_FUNCTIONS.register("emo_sorted", sorted_experts_forward)


def _register_targets(constants: ModuleType) -> None:
    """Where PEFT puts an adapter if nobody says where: as in Llama, whose attention has the same names.

    PEFT's LoRA does not ask here where experts are stacked; `lora_config` has its own default.
    """
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, targets in vars(constants).items():
        if name.endswith("_TARGET_MODULES_MAPPING") and attention.issuperset(targets.get("llama", "?")):
            targets.setdefault("emo", list(targets["llama"]))


def _register_quantiser(auto: ModuleType) -> None:
    importlib.import_module("transformers_emo.quantization.quantizer")  # which does it


def _complete_network(network: ModuleType) -> None:
    from transformers_emo.modeling_emo.package_hooks import package

    package.hooks = cast("PackageHooks", _HooksOnFirstUse())


class _HooksOnFirstUse:
    """The hooks, imported when one is first used: they import the network, which is being imported."""

    def __getattr__(self, name: str) -> Any:
        from transformers_emo.modeling_emo.package_hooks import package

        value = import_name(_HOOKS, name)
        package.hooks = cast("PackageHooks", sys.modules[_HOOKS])
        return value


def _or_told(action: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """Where PyTorch brought EMO into a program that need not know it, that program's imports do not fail."""

    def run(module: ModuleType) -> None:
        try:
            action(module)
        except Exception as error:
            if not transformers_emo_autoload.has_imported_emo:
                raise
            transformers_emo_autoload.tell(error)

    return run


_HOOK = AfterImport(
    {
        "transformers.models.auto.configuration_auto": _or_told(_register_configs),
        "transformers.models.auto.modeling_auto": _or_told(_register_models),
        "transformers.models.auto.tokenization_auto": _or_told(_register_tokenizer),
        "transformers.integrations.moe": _or_told(_register_experts),
        "transformers.quantizers.auto": _or_told(_register_quantiser),
        "peft.utils.constants": _or_told(_register_targets),
        _NETWORK: _complete_network,
    }
)
