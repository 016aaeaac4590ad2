"""Which experts a server or a request may use: subsets from files, and experts to leave out.

A subset file holds ids in the numbering of the full model (`retained_experts` says which of them a model
    holds).
The rules are those of `ExpertSubset` in `transformers-emo`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import Layer, layers_of

LIBRARY = "subsets"
"""The folder beside a model with the subsets that go by a name."""
_LARGEST = 8 << 20  # bytes of a subset file
_NAME = re.compile(r"\w[\w.+-]*")  # one part of a path: nothing outside the library can be named
_SHOWN = 80  # characters of what was given


class ExpertChoiceError(ValueError):
    """A choice of experts does not exist or does not fit the model: the text says why, and what to give.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import ExpertChoiceError
    >>> issubclass(ExpertChoiceError, ValueError)
    True

    ```
    """


@dataclass(frozen=True)
class Held:
    """The experts that a model holds.

    Args:
        layers (`tuple[Layer, ...]`): its layers.
        present (`tuple[tuple[int, ...], ...]`): for each layer the ids of its experts in the full model, in
            the model's order; none for a dense layer.
        root_sizes (`tuple[int, ...]`): how many experts each layer of the full model has.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import Held
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> Held.of(EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)).present
    ((0, 1, 2, 3),)

    ```
    """

    layers: tuple[Layer, ...]
    present: tuple[tuple[int, ...], ...]
    root_sizes: tuple[int, ...]

    @classmethod
    def of(cls, config: Any) -> Held:
        """What the model of a config holds."""
        layers = tuple(layers_of(config))
        present = [tuple(range(layer.num_experts)) for layer in layers]
        if config.retained_experts is not None:
            present = [tuple(ids or ()) for ids in config.retained_experts]
        sizes = config.root_experts_per_layer or [layer.num_experts for layer in layers]
        return cls(layers, tuple(present), tuple(sizes))

    def protected(self, index: int) -> set[int]:
        """The experts of a layer that every token uses, by their ids in the full model."""
        return {self.present[index][e] for e in self.layers[index].always_used}


@dataclass(frozen=True)
class Subset:
    """What a subset file says.

    Args:
        experts (`tuple[tuple[int, ...] | None, ...]`): the ids kept in each layer, `None` for a dense one.
        root_sizes (`tuple[int, ...]`, *optional*): experts in each layer of the full model it was made for.
        drop_shared (`bool`): it may leave out experts that every token uses.
        local_ids (`bool`): its ids are those of the model it was made from, and not of the full model.

    Example: see `read_subset`.
    """

    experts: tuple[tuple[int, ...] | None, ...]
    root_sizes: tuple[int, ...] | None = None
    drop_shared: bool = False
    local_ids: bool = False


def read_subset(path: str | Path) -> Subset:
    """Read a subset that `transformers-emo` saved, or the `pruning_metadata.json` of EMO's authors.

    Args:
        path (`str` or `Path`): the file.

    Raises:
        ExpertChoiceError: if it is no such file.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import read_subset
    >>> (tmp_path / "math.json").write_text('{"experts": [[3, 1], null]}')
    27
    >>> read_subset(tmp_path / "math.json").experts
    ((1, 3), None)

    ```
    """
    try:
        if Path(path).stat().st_size > _LARGEST:
            raise ExpertChoiceError(f"{path} is larger than {_LARGEST} bytes: it is no expert subset.")
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpertChoiceError(
            f"Cannot read the expert subset {path}: {error.strerror or error}."
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ExpertChoiceError):
            raise
        raise ExpertChoiceError(f"{path} is no expert subset: it does not hold JSON ({error}).") from error
    if not isinstance(data, dict) or not ({"experts", "experts_kept_per_layer"} & set(data)):
        raise ExpertChoiceError(f"{path} is no expert subset: it has no list `experts`.")
    if data.get("format", "emo-expert-subset") != "emo-expert-subset" or data.get("version", 1) != 1:
        raise ExpertChoiceError(
            f"{path} has the format {data.get('format')!r}, version {data.get('version')!r}; expected "
            "'emo-expert-subset', version 1."
        )
    authors = "experts_kept_per_layer" in data
    experts = data["experts_kept_per_layer"] if authors else data["experts"]
    if authors and isinstance(experts, list):
        experts = [ids or None for ids in experts]
    sizes = data.get("root_experts_per_layer")
    return Subset(
        checked_ids(experts, str(path)),
        None if sizes is None else tuple(sizes),
        data.get("drop_shared") is True,
        authors or data.get("local_ids") is True,
    )


def checked_ids(experts: Any, what: str) -> tuple[tuple[int, ...] | None, ...]:
    """Lists of ids, sorted; `None` stays for a dense layer.

    Args:
        experts: what should be one list of ids a layer.
        what (`str`): what it is, for the error.

    Raises:
        ExpertChoiceError: if it is something else.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import checked_ids
    >>> checked_ids([[3, 1], None], "the subset")
    ((1, 3), None)

    ```
    """
    if not isinstance(experts, Sequence) or isinstance(experts, str | bytes):
        raise ExpertChoiceError(f"{what}: expected one list of ids a layer, got {_short(experts)}.")
    checked: list[tuple[int, ...] | None] = []
    for index, ids in enumerate(experts):
        if ids is None:
            checked.append(None)
            continue
        listed = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
        wrong = (
            [e for e in ids if isinstance(e, bool) or not isinstance(e, int) or e < 0] if listed else [ids]
        )
        if wrong or len(set(ids)) != len(ids):
            raise ExpertChoiceError(
                f"{what}: layer {index} has {_short(wrong[0] if wrong else ids)}, expected different ids "
                "from 0."
            )
        checked.append(tuple(sorted(ids)))
    return tuple(checked)


def fitted(subset: Subset, held: Held, what: str) -> tuple[tuple[int, ...] | None, ...]:
    """The ids of a subset in the numbering of the full model, known to fit a model.

    Args:
        subset (`Subset`): the subset.
        held (`Held`): what the model holds.
        what (`str`): the subset's name, for the error.

    Raises:
        ExpertChoiceError: if it was made for another model, keeps what the model does not hold, keeps no
        routed
            expert of a layer, or drops one that every token uses without saying `drop_shared`.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import Held, Subset, fitted
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> held = Held.of(EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2))
    >>> fitted(Subset(((0, 3),)), held, "math")
    ((0, 3),)

    ```
    """
    if len(subset.experts) != len(held.layers) or subset.root_sizes not in (None, held.root_sizes):
        raise ExpertChoiceError(
            f"{what} was made for another model: it has {len(subset.experts)} layers with "
            f"{_short(subset.root_sizes)} experts, and this model {len(held.layers)} with "
            f"{_short(held.root_sizes)}."
        )
    result: list[tuple[int, ...] | None] = []
    for index, (ids, layer, present) in enumerate(
        zip(subset.experts, held.layers, held.present, strict=True)
    ):
        if layer.is_dense:
            if ids:
                raise ExpertChoiceError(
                    f"{what} keeps experts {_short(ids)} of layer {index}, which is dense."
                )
            result.append(None)
            continue
        ids = ids or ()
        if subset.local_ids:
            outside = [e for e in ids if e >= layer.num_experts]
            ids = tuple(present[e] for e in ids if e < layer.num_experts)
        else:
            outside = sorted(set(ids) - set(present))
        if outside:
            raise ExpertChoiceError(
                f"{what} keeps expert {outside[0]} of layer {index}, which this model does not hold: it has "
                f"{len(present)} of {held.root_sizes[index]}. Serve the full model, or give a subset of "
                "this one."
            )
        protected = held.protected(index)
        if protected - set(ids) and not subset.drop_shared:
            raise ExpertChoiceError(
                f"{what} drops expert {min(protected - set(ids))} of layer {index}, which every token uses: "
                "add it."
            )
        if not set(ids) - protected:
            raise ExpertChoiceError(f"{what} keeps no routed expert of layer {index}: keep at least one.")
        result.append(ids)
    return tuple(result)


def excluded(value: Any, held: Held, find: Any) -> list[set[int]]:
    """The experts to leave out in each layer, in the numbering of the full model.

    Args:
        value: the name of a subset, whose routed experts are left out; ids by layer, as an object or as its
            JSON text, `{"0": [3, 5]}`; or one list of ids a layer.
        held (`Held`): what the model holds.
        find (`Callable`): from a name to its `Subset`.

    Raises:
        ExpertChoiceError: if it is none of these, names a layer or an expert that the model does not have, or
        one
            that every token uses.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import Held, excluded
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> held = Held.of(EmoConfig(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2))
    >>> excluded('{"1": [0, 2]}', held, None)
    [set(), {0, 2}]

    ```
    """
    number = len(held.layers)
    is_subset = False
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ExpertChoiceError(
                f"`exclude_experts` is {_short(value)}, which is no JSON: {error}."
            ) from error
    if isinstance(value, str):
        subset = find(value)
        if len(subset.experts) != number or subset.root_sizes not in (None, held.root_sizes):
            raise ExpertChoiceError(f"The subset {_short(value)} to leave out was made for another model.")
        is_subset, value = True, list(subset.experts)
        if subset.local_ids:
            raise ExpertChoiceError(
                "The subset to leave out numbers the experts of the model it was made from. Save it anew "
                "with `emo select`, which numbers those of the full model."
            )
    if isinstance(value, Mapping):
        wrong = [k for k in value if not str(k).isdecimal() or int(k) >= number]
        if wrong:
            raise ExpertChoiceError(
                f"`exclude_experts` names layer {_short(wrong[0])}, expected 0 to {number - 1}."
            )
        by_layer = {int(k): ids for k, ids in value.items()}
        value = [by_layer.get(index) for index in range(number)]
    ids_by_layer = checked_ids(value, "`exclude_experts`")
    if len(ids_by_layer) != number:
        raise ExpertChoiceError(f"`exclude_experts` has {len(ids_by_layer)} layers, the model has {number}.")
    result = []
    for index, ids in enumerate(ids_by_layer):
        outside = [e for e in ids or () if e >= held.root_sizes[index]]
        if outside:
            raise ExpertChoiceError(
                f"`exclude_experts` names expert {outside[0]} of layer {index}, expected 0 to "
                f"{held.root_sizes[index] - 1}."
            )
        protected = held.protected(index)
        if not is_subset and protected & set(ids or ()):
            raise ExpertChoiceError(
                f"`exclude_experts` names expert {min(protected & set(ids or ()))} of layer {index}, which "
                "every token uses: leave it out of the list."
            )
        result.append(set(ids or ()) - protected)
    return result


def without(
    kept: Sequence[tuple[int, ...] | None], never: Sequence[set[int]], held: Held
) -> tuple[tuple[int, ...] | None, ...]:
    """What remains of the experts kept without those never to use.

    Args:
        kept (`Sequence[tuple[int, ...] | None]`): ids in each layer.
        never (`Sequence[set[int]]`): from `excluded`.
        held (`Held`): what the model holds.

    Raises:
        ExpertChoiceError: if no routed expert of a layer remains.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import Held, without
    >>> from transformers_emo_vllm.config import EmoConfig
    >>> held = Held.of(EmoConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2))
    >>> without([(0, 1, 2, 3)], [{1}], held)
    ((0, 2, 3),)

    ```
    """
    result: list[tuple[int, ...] | None] = []
    for index, (ids, out) in enumerate(zip(kept, never, strict=True)):
        left = None if ids is None else tuple(e for e in ids if e not in out)
        if left is not None and not set(left) - held.protected(index):
            raise ExpertChoiceError(f"No routed expert of layer {index} remains: exclude fewer.")
        result.append(left)
    return tuple(result)


def library_file(name: str) -> str | None:
    """Where the library holds a subset, `None` for what can be no name.

    Args:
        name (`str`): such as `"coq"`.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import library_file
    >>> library_file("coq"), library_file("../coq")
    ('subsets/coq.json', None)

    ```
    """
    name = name.removesuffix(".json")
    return f"{LIBRARY}/{name}.json" if _NAME.fullmatch(name) else None


def no_subset(name: Any, names: Sequence[str]) -> ExpertChoiceError:
    """The error for a name that the library does not have.

    Args:
        name: what was given.
        names (`Sequence[str]`): the names that are there.

    Example:

    ```python
    >>> from transformers_emo_vllm.choice import no_subset
    >>> print(no_subset("cooq", ["coq", "python"]))
    There is no expert subset 'cooq': the model's subsets/ holds coq, python.

    ```
    """
    there = f"holds {', '.join(names)}" if names else "holds none"
    return ExpertChoiceError(f"There is no expert subset {_short(name)}: the model's {LIBRARY}/ {there}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
