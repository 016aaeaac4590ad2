"""Converting older repositories, and mixtures of experts of other families, to clean EMO folders.

The bytes of weights stay as they are. A model of another family is converted only if an EMO computes exactly
the same. Otherwise the error says why not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoints import Checkpoint, CheckpointError
from ..checkpoints.local_files import file_inside
from ..checkpoints.source_files import SourceFiles
from ..checkpoints.writing.output_folder import check_new, new_folder
from ..checkpoints.writing.safetensors_writing import write_json
from ..checkpoints.writing.tensor_writer import rename_tensors
from ..configuration import LEGACY_MODEL_TYPE, EmoConfig
from ..quantization.packed_config import refuse_quantised
from .from_olmo_core import PROVENANCE, generation_config
from .model_config import emo_config, read_model_config
from .other_families import emo_name, emo_settings
from .released_shapes import check_released_shapes
from .source_folder import ALL_FILES, name_and_commit, source_folder

# All other files are copied, but for those that are written anew.
_CODE_AND_PICKLES = {".py", ".pyc", ".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_WRITTEN_ANEW = {"config.json", "generation_config.json", SAFE_WEIGHTS_INDEX_NAME, PROVENANCE}


def upgrade_checkpoint(
    repo: str | os.PathLike,
    out: str | os.PathLike,
    *,
    settings: Mapping[str, Any] | None = None,
    link: bool = False,
    progress: bool = True,
    **hub_kwargs: Any,
) -> EmoConfig:
    """Make a clean EMO folder for Transformers 5 of an older repository, or of a standard mixture of experts.

    - EMO by any of its names, with or without remote code: the new `config.json` says `emo`, names no remote
      code and asks for no router logits. Code and pickles are not copied. In `generation_config.json` the
      padding token has the name that `generate` reads.
    - Mixtral becomes an EMO without shared experts and with `norm_topk_prob`. Its tensors get other names,
      and their bytes stay. In float32 the logits are equal.
    - OLMoE and Qwen's mixtures of experts are refused. They normalise queries and keys, have biases, or have
      a shared expert with a gate of its own, and an EMO does not.

    With `settings` the model is ready for annealing with document pools. `conversion.json` names the source,
    and has the hashes of the weights.

    Args:
        repo (`str` or `os.PathLike`): a folder, or a Hub repository, which is downloaded without its code.
        out (`str` or `os.PathLike`): the folder to make. It must not exist.
        settings (`Mapping[str, Any]`, *optional*): settings of training, such as `document_pool_min` and
            `document_pool_max`; see `convert_to_olmo_core`.
        link (`bool`, defaults to `False`): make hard links to the weights instead of copies, if tensors keep
            their names and the folder is on the same disk. A change to one file then changes the other too.
        progress (`bool`, defaults to `True`): show a progress bar.
        hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder` and so on for a repository, as for
            `from_pretrained`.

    Returns:
        `EmoConfig`: the config of the new folder.

    Raises:
        CheckpointError: if the weights are pickled, incomplete, damaged or not those that the config
            describes.
        ValueError: if the model is of another family and an EMO does not compute the same, or a setting is
            unknown. The message says why.
        OSError: if there is no such folder or repository, or it may not be read.
        FileExistsError: if `out` exists.

    Example:

    ```python
    >>> from transformers_emo.conversion import upgrade_checkpoint
    >>> pools = {"document_pool_min": 3, "document_pool_max": 31}
    >>> upgrade_checkpoint("model_cards/toy-emo", tmp_path / "emo", settings=pools).document_pool_max
    31

    ```
    """
    out = Path(out)
    check_new(out)
    before = SourceFiles.of(repo, patterns=ALL_FILES, subfolder=hub_kwargs.get("subfolder"), links=link)
    folder = source_folder(repo, without=_CODE_AND_PICKLES, **hub_kwargs)
    content = read_model_config(folder)
    weights = Checkpoint.from_folder(folder)
    weights.source.close()
    is_emo = content.get("model_type") in (EmoConfig.model_type, LEGACY_MODEL_TYPE)
    config = emo_config(content if is_emo else emo_settings(content, weights.tensors), settings or {})
    refuse_quantised(config, os.fspath(repo))
    names = {name: name if is_emo else emo_name(content["model_type"], name) for name in weights.tensors}
    check_released_shapes({names[name]: span.shape for name, span in weights.tensors.items()}, config)
    if len(set(names.values())) < len(names):
        twice = sorted(name for name in names if list(names.values()).count(names[name]) > 1)
        raise CheckpointError(
            f"{twice[0]} and {twice[1]} are both {names[twice[0]]} of an EMO: the checkpoint has a tensor "
            "twice, download it again."
        )
    files = sorted({span.file for span in weights.tensors.values()})
    kept = _kept_files(folder)
    # Hashing runs while the next file is copied, and reads from the page cache.
    with new_folder(out, sources=[before]) as partial, ThreadPoolExecutor(1) as hasher:
        hashing = {}
        for file in tqdm(files, "Copying", unit="file", disable=not progress):
            if not is_emo:
                rename_tensors(folder / file, partial / file, names)
            elif link:
                _link(folder / file, partial / file)
            else:
                shutil.copyfile(folder / file, partial / file)
            hashing[file] = hasher.submit(_sha256, partial / file)
        if len(files) > 1 or files[0] != SAFE_WEIGHTS_NAME:
            _write_index(folder, partial, names, weights)
        config.save_pretrained(partial)
        _generation_config(folder, config).save_pretrained(partial)
        for path in kept:
            target = partial / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_without_code(file_inside(folder, path.relative_to(folder)), target)
        hashes = {file: job.result() for file, job in hashing.items()}
        write_json(partial / PROVENANCE, _provenance(repo, folder, content["model_type"], len(names), hashes))
    return config


def _provenance(
    repo: str | os.PathLike, folder: Path, model_type: str, tensors: int, hashes: dict[str, str]
) -> dict[str, Any]:
    name, commit = name_and_commit(repo, folder)
    return {
        "converted_from": model_type,
        "model": name,
        "revision": commit,
        "source_sha256": {"config.json": _sha256(folder / "config.json")},
        "tensors": tensors,
        "sha256": hashes,
        "left_out": sorted(path.name for path in folder.iterdir() if path.suffix in _CODE_AND_PICKLES),
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept_files(folder: Path) -> list[Path]:
    """The files to copy, also those in folders, such as the subsets in `subsets/`."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.suffix not in _CODE_AND_PICKLES | {".safetensors"}
        and not path.name.endswith(".index.json")
        and not (path.parent == folder and path.name in _WRITTEN_ANEW)
    )


def _copy_without_code(source: Path, target: Path) -> None:
    """Copy a file. A `tokenizer_config.json` loses the name of code that is not copied."""
    if source.name != "tokenizer_config.json":
        shutil.copyfile(source, target)
        return
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        has_code = "auto_map" in content
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source} is no JSON object: download it again.") from error
    if has_code:
        del content["auto_map"]
        write_json(target, content)
    else:
        shutil.copyfile(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)  # the Hub's cache holds links to its files
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _write_index(folder: Path, partial: Path, names: dict[str, str], weights: Checkpoint) -> None:
    try:
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        metadata = index.get("metadata", {})
    except (OSError, ValueError, AttributeError):
        metadata = {}
    weight_map = {names[name]: span.file for name, span in weights.tensors.items()}
    write_json(partial / SAFE_WEIGHTS_INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def _generation_config(folder: Path, config: EmoConfig) -> GenerationConfig:
    path = folder / "generation_config.json"
    if not path.is_file():
        return generation_config(config)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = {
            name: value
            for name, value in content.items()
            if name not in ("pad_token", "_from_model_config", "transformers_version")
        }
        tokens = {name: getattr(config, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
        return GenerationConfig(**tokens | settings)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no generation config: {error}. Download it again.") from error
