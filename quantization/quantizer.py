"""What Transformers asks a quantiser for."""

from __future__ import annotations

from typing import Any

from ..imports.transformers_versions import private_names
from ..modeling_emo.kernels.packed.packed_tensor import PackedTensor
from .packed_config import METHOD, PackedConfig
from .packed_parts import released_state

with private_names("quantiser"):
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer


class PackedQuantizer(HfQuantizer):
    """Quantises a model while it is read, or reads one that is packed. The reading itself is done elsewhere.

    Args:
        quantization_config (`PackedConfig`): how.
        kwargs: of Transformers.

    Example: see `PackedConfig`.
    """

    quantization_config: PackedConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work.

        Args:
            device_map (`dict` or `str`, *optional*): where weights go.
            args, kwargs: not looked at.

        Raises:
            ValueError: if weights are to be offloaded to the disk.
        """
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ValueError(
                "`device_map` puts weights on the disk, where weights in few bits cannot be: leave them in "
                "memory."
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.quantization_config = self.quantization_config.for_model(model.config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for parameter in model.parameters():
            if isinstance(parameter, PackedTensor):
                parameter.requires_grad_(False)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        """What is saved: packed weights in their parts; `None` for the adapters of a model.

        Args:
            model (`EmoPreTrainedModel`): the model.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return released_state(model.state_dict()), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`bool`: it can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """`bool`: adapters on it can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """`bool`: its own weights cannot."""
        return False

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from torch import nn

        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, PackedTensor):
                    setattr(module, name, nn.Parameter(parameter.dequantize(dtype)))
        return model


# Here and not where it is asked for: importing this module imports that one, and that one asks for this.
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(PackedConfig)
    register_quantizer(METHOD)(PackedQuantizer)
