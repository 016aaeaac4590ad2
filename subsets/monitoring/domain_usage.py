"""How much of a request's routing went to the experts of each domain.

`generate(..., return_experts=True)` says which experts each token took. A model's library says which
experts belong to a domain. Together they say what a request was about, as the routers saw it: to be logged,
and to see that excluded experts stay out.

Shape suffixes: B requests, L layers, E experts of the root model, N domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ...modeling_emo.in_use.routed_experts import RoutedExperts
from ..expert_subset import ExpertSubset
from ..library import LIBRARY, HubLibrary, library_names
from ..loading.model_source import ModelSource
from ..validation import SubsetError


class DomainShare(NamedTuple):
    """How much of a request's routing went to one domain.

    Args:
        share (`float`): part of the routing mass that went to the domain's experts, from 0 to 1. An expert
            may belong to several domains: the shares of all domains may add up to more than 1.
        by_chance (`float`): the part of the root model's experts that belong to the domain. Routing that
            cared for no domain would give this share.

    Example: see `DomainMonitor`.
    """

    share: float
    by_chance: float

    @property
    def excess(self) -> float:
        """How far the share is above that of chance."""
        return self.share - self.by_chance


class TopExpert(NamedTuple):
    """One of the experts that a request used most.

    Args:
        layer (`int`): its layer.
        expert (`int`): its id in the root model.
        share (`float`): part of the layer's routing mass that it got.

    Example: see `DomainMonitor`.
    """

    layer: int
    expert: int
    share: float


@dataclass(frozen=True)
class RequestUsage:
    """What one request used.

    Args:
        num_tokens (`int`): tokens that passed the routers.
        domains (`dict[str, DomainShare]`): by name, the largest excess over chance first.
        top_experts (`list[TopExpert]`): the experts with the largest shares of their layers, in order.

    Example: see `DomainMonitor`.
    """

    num_tokens: int
    domains: dict[str, DomainShare]
    top_experts: list[TopExpert]

    @property
    def nearest(self) -> str | None:
        """`str`, *optional*: the domain with the largest excess; `None` if no domain is above chance."""
        name = next(iter(self.domains), None)
        return name if name is not None and self.domains[name].excess > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """`dict[str, Any]`: the same as JSON data, for a log."""
        data = asdict(self)
        data["domains"] = {name: share._asdict() for name, share in self.domains.items()}
        data["top_experts"] = [expert._asdict() for expert in self.top_experts]
        return data | {"nearest": self.nearest}


class DomainMonitor:
    """Says of every request which domains' experts it used.

    Args:
        domains (`Mapping[str, ExpertSubset]`): the experts of each domain, in the root model's numbering.

    Raises:
        SubsetError: if there is no domain, or a subset is in the numbering of another model than the root.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.subsets import DomainMonitor
    >>> path = "model_cards/emo-tiny"
    >>> model, tokenizer = EmoForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    >>> inputs = tokenizer("def read(path):\\n    with open(path) as file:\\n", return_tensors="pt")
    >>> out = model.generate(**inputs, return_experts=True, max_new_tokens=16, do_sample=False)
    >>> [request] = DomainMonitor.of(model)(out.experts)
    >>> request.nearest, request.num_tokens == out.sequences.shape[1] - 1
    ('python', True)

    ```
    """

    def __init__(self, domains: Mapping[str, ExpertSubset]):
        if not domains:
            raise SubsetError(
                "There is no domain to tell: give expert subsets by name, or save some as "
                "subsets/<name>.json beside the model (`emo select`)."
            )
        for name, subset in domains.items():
            if subset.local_ids:
                raise SubsetError(
                    f"The experts of {name!r} are in the numbering of a model that was cut down, expected "
                    "the root model's: choose them with `select_experts` on the full model."
                )
        self.domains = dict(domains)
        self._masks: dict[Any, torch.Tensor] = {}

    @classmethod
    def of(cls, model: Any) -> DomainMonitor:
        """A monitor for the domains in the library of the folder or repository that a model was loaded from.

        Args:
            model (`EmoPreTrainedModel`): the model.

        Raises:
            SubsetError: if there is no library, or it is empty.

        Example: see `DomainMonitor`.
        """
        return cls(library_subsets(model))

    def __call__(
        self, experts: RoutedExperts, part: Literal["all", "prompt", "new"] = "all", *, num_top: int = 8
    ) -> list[RequestUsage]:
        """Say what each request used.

        Args:
            experts (`RoutedExperts`): the `experts` of an output of `generate(..., return_experts=True)`.
            part (`str`, defaults to `"all"`): which tokens count: all, those of the prompt, or the new ones.
            num_top (`int`, defaults to 8): how many experts to name.

        Returns:
            `list[RequestUsage]`: one for each sequence, in their order.

        Raises:
            SubsetError: if the domains are of a model with other layers or experts.

        Example: see `DomainMonitor`.
        """
        usage_BLE = experts.usage(part, weighted=True)
        masks_NLE = self._masks_for(experts, usage_BLE.device)
        mass_B = usage_BLE.sum(dim=(1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        shares_BN = torch.einsum("ble,nle->bn", usage_BLE, masks_NLE) / mass_B[:, None]
        ratio_BLE = usage_BLE / usage_BLE.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        num_top = min(num_top, ratio_BLE[0].numel())
        top = ratio_BLE.flatten(1).topk(num_top, dim=-1)
        first = experts.num_prompt if part == "new" else 0
        last = experts.num_prompt if part == "prompt" else None
        # One wait for the device, for everything.
        columns = [shares_BN, top.values, top.indices.float(), experts.is_read_BS[:, first:last].sum(1, True)]
        rows = torch.cat([column.float() for column in columns], dim=1).cpu()
        chance = self._chance(experts)
        found = []
        for row in rows:
            shares, values, places, tokens = row.split([len(chance), num_top, num_top, 1])
            domains = {
                name: DomainShare(share, by_chance)
                for (name, by_chance), share in zip(chance.items(), shares.tolist(), strict=True)
            }
            tops = [
                TopExpert(*divmod(int(place), usage_BLE.shape[2]), value)
                for place, value in zip(places.tolist(), values.tolist(), strict=True)
                if value > 0
            ]
            ordered = dict(sorted(domains.items(), key=lambda item: -item[1].excess))
            found.append(RequestUsage(int(tokens), ordered, tops))
        return found

    def _routed(self, name: str, experts: RoutedExperts) -> list[list[int]]:
        """A domain's experts of each layer without those that every token uses."""
        subset = self.domains[name]
        if len(subset.experts) != len(experts.sizes):
            raise SubsetError(
                f"The experts of {name!r} are of a model with {len(subset.experts)} layers, and this one has "
                f"{len(experts.sizes)}: give the domains of this model."
            )
        routed = []
        for index, (ids, always, size) in enumerate(
            zip(subset.experts, experts.always_used, experts.sizes, strict=True)
        ):
            outside = [e for e in ids or () if e >= size]
            if outside:
                raise SubsetError(
                    f"{name!r} names expert {outside[0]} of layer {index}, and the model has {size} there: "
                    "give the domains of this model."
                )
            routed.append(sorted(set(ids or ()) - set(always)))
        return routed

    def _masks_for(self, experts: RoutedExperts, device: torch.device) -> torch.Tensor:
        """(N, L, E), 1 for the experts of a domain."""
        key = (tuple(experts.sizes), tuple(map(tuple, experts.always_used)), device)
        if key not in self._masks:
            masks_NLE = torch.zeros(len(self.domains), len(experts.sizes), max(experts.sizes))
            for number, name in enumerate(self.domains):
                for layer, ids in enumerate(self._routed(name, experts)):
                    masks_NLE[number, layer, ids] = 1
            self._masks[key] = masks_NLE.to(device)
        return self._masks[key]

    def _chance(self, experts: RoutedExperts) -> dict[str, float]:
        """The part of the root model's routed experts that belong to each domain, as a mean over layers."""
        sizes = [size - len(always) for size, always in zip(experts.sizes, experts.always_used, strict=True)]
        return {
            name: sum(
                len(ids) / size for ids, size in zip(self._routed(name, experts), sizes, strict=True) if size
            )
            / sum(size > 0 for size in sizes)
            for name in self.domains
        }


def library_subsets(model: Any) -> dict[str, ExpertSubset]:
    """All subsets in the library of the folder or repository that a model was loaded from.

    Args:
        model (`EmoPreTrainedModel`): the model.

    Returns:
        `dict[str, ExpertSubset]`: by name, sorted; empty if there is no library.

    Example:

    ```python
    >>> from transformers_emo import EmoForCausalLM
    >>> from transformers_emo.subsets.monitoring.domain_usage import library_subsets
    >>> list(library_subsets(EmoForCausalLM.from_pretrained("model_cards/emo-tiny")))[:3]
    ['c', 'chinese', 'coq']

    ```
    """
    folder, fetch = ModelSource.of_loaded(model.config).library
    if folder is not None:
        return {
            name: ExpertSubset.load(Path(folder, f"{LIBRARY}/{name}.json")) for name in library_names(folder)
        }
    if not isinstance(fetch, HubLibrary):
        return {}
    files = {name: fetch(f"{LIBRARY}/{name}.json") for name in fetch.names()}
    return {name: ExpertSubset.load(file) for name, file in files.items() if file is not None}
