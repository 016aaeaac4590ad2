"""The command `emo`; also `python -m transformers_emo`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from .run_command import add_run
from .select_command import add_select
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): the command's words; `sys.argv` by default.

    Returns:
        `int`: the exit status: 0, or 1 after an error, which stands on stderr in one line.

    Example:

    ```python
    >>> from transformers_emo.cli import main
    >>> main(["train", "no-such-file.yaml"])
    1

    ```
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        if parsed.traceback:
            raise
        print(f"emo {parsed.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emo", description="EMO for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (
        _add_train,
        add_run,
        add_select,
        _add_extract,
        _add_write_back,
        _add_convert,
        _add_shard,
        _add_push,
        _add_cache,
        _add_retention,
    ):
        add(commands)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train from a recipe in a YAML file",
        description="Train from a recipe: pretrain, anneal or fine-tune, all of a model, a subset of its "
        "experts or an adapter. On several devices: `torchrun --nproc-per-node=N -m transformers_emo train`.",
    )
    train.add_argument(
        "recipe", help="YAML file; see `transformers_emo.training.Recipe` and examples/recipes"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_setting,
        help="a setting instead of the file's, such as training.max_steps=100; may be repeated",
    )
    train.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint")
    train.set_defaults(run=_train)


def _add_retention(commands: Any) -> None:
    retention = commands.add_parser(
        "retention",
        help="measure how quality falls as experts are removed",
        description="Measure loss and next-token accuracy at shares of the experts, domain by domain, and "
        "write tables and pictures. The same command goes on after an interruption, or adds to it.",
    )
    retention.add_argument(
        "models", nargs="+", metavar="MODEL", type=_named, help="folder or Hub repository, or NAME=FOLDER"
    )
    retention.add_argument(
        "--texts",
        required=True,
        metavar="DIR",
        help="calibration/<domain>.jsonl and test/<domain>.jsonl, or <domain>.jsonl with a `split` in each "
        "line; a document a line, its text as `text`",
    )
    retention.add_argument("--out", required=True, metavar="DIR", help="where results go")
    retention.add_argument(
        "--baseline", metavar="NAME", help="compare the other models with this one; the last of several"
    )
    retention.add_argument("--domains", nargs="+", metavar="NAME", help="only these; all by default")
    retention.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="ways to choose experts: layerwise, global, easy_ep, random (default these), reap",
    )
    retention.add_argument(
        "--shares",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="of the experts, above 0, at most 1 (default 1 to 0.03125, by halves)",
    )
    retention.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="draw calibration documents N times (default 1)"
    )
    retention.add_argument(
        "--calibration", type=int, default=8, metavar="N", help="calibration documents a domain (default 8)"
    )
    retention.add_argument("--test", type=int, metavar="N", help="only the first N test documents a domain")
    retention.add_argument(
        "--window", type=int, metavar="N", help="cut documents to N tokens; the models' context by default"
    )
    retention.add_argument(
        "--batch-tokens", type=int, default=2048, metavar="N", help="tokens in a batch (default 2048)"
    )
    retention.add_argument("--dtype", help="to load models in, such as bfloat16; as saved by default")
    retention.add_argument("--device", help="such as cpu or cuda; a GPU where there is one by default")
    retention.add_argument("--no-topics", action="store_true", help="do not compare domains' routing")
    retention.add_argument("--no-plots", action="store_true", help="no pictures: needs no matplotlib")
    retention.set_defaults(run=_retention)


def _add_extract(commands: Any) -> None:
    extract = commands.add_parser(
        "extract",
        help="write a subset of experts as a model of its own",
        description="Write a subset of a model's experts as a stand-alone model, which loads without the "
        "subset. Bytes are copied from file to file: no model is built.",
    )
    extract.add_argument("model", help="folder or Hub repository")
    extract.add_argument("subset", help="JSON file, or the name of one in the model's subsets/")
    extract.add_argument("out", help="the folder to make")
    extract.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default 5GB)")
    extract.add_argument("--dtype", help="to convert to, such as bfloat16 (default as they are)")
    extract.add_argument("--revision", help="of the Hub repository")
    extract.set_defaults(run=_extract)


def _add_write_back(commands: Any) -> None:
    write_back = commands.add_parser(
        "write-back",
        help="put fine-tuned subsets back into the full model",
        description="Write the full model anew with the experts of fine-tuned subsets in their old places, "
        "file by file. What several hold is averaged. The same command goes on after an interruption.",
    )
    write_back.add_argument("full", help="folder or Hub repository of the model the subsets come from")
    write_back.add_argument("tuned", nargs="+", help="folder or Hub repository of a fine-tuned subset")
    write_back.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    write_back.add_argument(
        "--what",
        default="routed",
        help="routed (default), shared, router, backbone, several joined by +, or all",
    )
    write_back.add_argument(
        "--weight", type=float, default=1.0, help="of the tuned values: 1 replaces (default), 0.5 is the mean"
    )
    write_back.add_argument(
        "--no-root-check", action="store_true", help="do not compare routers to tell strangers"
    )
    write_back.add_argument("--revision", help="of the full model's Hub repository")
    write_back.set_defaults(run=_write_back)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="convert checkpoints from one layout to another")
    kinds = convert.add_subparsers(dest="kind", required=True)
    olmo_core = kinds.add_parser(
        "olmo-core-to-hf",
        help="a training checkpoint, for from_pretrained",
        description="Convert a step folder of OLMo-core (EMO, standard mixture of experts or dense), tensor "
        "by tensor. Nothing in it is unpickled.",
    )
    olmo_core.add_argument("step_folder", metavar="STEP", help="holds config.json and model_and_optim/")
    olmo_core.add_argument("out", metavar="OUT", help="the folder to make")
    olmo_core.add_argument(
        "--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16"
    )
    olmo_core.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default 5GB)"
    )
    olmo_core.add_argument("--tokenizer", metavar="DIR", help="copy the tokenizer files of this folder")
    olmo_core.add_argument(
        "--verify",
        action="store_true",
        help="check saved sums, and compare logits with the training checkpoint",
    )
    olmo_core.set_defaults(run=_convert_olmo_core)
    back = kinds.add_parser(
        "hf-to-olmo-core",
        help="a model, to go on training it with OLMo-core",
        description="Convert a model folder to a step folder of OLMo-core, tensor by tensor: parameters in "
        "float32 and config.json, no state of an optimiser.",
    )
    back.add_argument("model", metavar="MODEL", help="folder with config.json and safetensors weights")
    back.add_argument("out", metavar="OUT", help="the folder to make, such as step0")
    back.add_argument(
        "--original",
        metavar="STEP",
        help="a step of the run it comes from, for padded vocabulary rows (zeros otherwise), data, optimiser",
    )
    _add_settings(back)
    back.add_argument("--verify", action="store_true", help="read everything back and compare it")
    back.set_defaults(run=_convert_to_olmo_core)
    upgrade = kinds.add_parser(
        "upgrade",
        help="an older EMO repository, or a standard mixture of experts, as a clean folder",
        description="Make a clean Transformers 5 folder of a repository with legacy names or remote code, or "
        "of a standard mixture of experts that an EMO computes exactly. Weights are copied byte for byte.",
    )
    upgrade.add_argument("repo", metavar="REPO", help="folder or Hub repository")
    upgrade.add_argument("out", metavar="OUT", help="the folder to make")
    _add_settings(upgrade)
    upgrade.add_argument("--link", action="store_true", help="hard links to the weights instead of copies")
    _add_hub(upgrade)
    upgrade.set_defaults(run=_upgrade)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_setting,
        help="a setting of training, such as document_pool_min=8; may be repeated",
    )


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="of the Hub repository (default main)")
    parser.add_argument("--token", help="for the Hub (default that of `hf auth login`, or HF_TOKEN)")
    parser.add_argument("--cache-dir", metavar="DIR", help="for downloads; HF_HUB_CACHE by default")


def _hub_kwargs(parsed: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(parsed, name) for name in ("revision", "token", "cache_dir")}
    return {name: value for name, value in given.items() if value is not None}


def _add_shard(commands: Any) -> None:
    shard = commands.add_parser(
        "shard",
        help="cut a checkpoint by expert, so that a subset downloads only its own files",
        description="Cut a checkpoint into a backbone and a file for each expert. Any tool loads the whole "
        "as usual. The same command goes on after an interruption.",
    )
    shard.add_argument("model", help="folder or Hub repository")
    shard.add_argument("out", metavar="OUT", help="the folder to make")
    shard.add_argument(
        "--experts-per-file", type=int, default=1, metavar="N", help="fewer files, more waste (default 1)"
    )
    _add_hub(shard)
    shard.set_defaults(run=_shard)


def _add_push(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="put a model, an adapter or documents on the Hub",
        description="Put a folder on the Hub. A folder of <domain>.jsonl becomes a dataset. The same command "
        "goes on after an interruption: what has been sent is not sent again.",
    )
    push.add_argument("folder", help="a model, an adapter, or documents")
    push.add_argument("repo", metavar="REPO", help="user/name; made if need be")
    push.add_argument("--private", action="store_true", default=None, help="if it is made")
    push.add_argument("--revision", help="the branch")
    push.set_defaults(run=_push)


def _add_cache(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="list or clear what has been fetched of weights in part",
        description="List the files of the Hub of which parts are kept, or clear them. Whole files are in "
        "the ordinary cache: `hf cache`.",
    )
    cache.add_argument("action", nargs="?", choices=("list", "clear"), default="list", help="(default list)")
    cache.add_argument("repo", nargs="?", help="only this repository")
    cache.add_argument("--cache-dir", metavar="DIR", help="the cache; HF_HUB_CACHE by default")
    cache.set_defaults(run=_cache)


def _named(text: str) -> tuple[str, str]:
    """The name and the path of a model."""
    name, equals, path = text.partition("=")
    if not equals:
        name, path = os.path.basename(os.path.normpath(text)), text
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a path nor NAME=PATH")
    return name, path


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    from transformers_emo.training.recipe_files import read_yaml

    try:
        return name, read_yaml(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"the value of {text!r} is no YAML") from error


def _train(parsed: argparse.Namespace) -> None:
    # Imported here: the other commands start without a training stack.
    from transformers_emo.training import Recipe, train

    train(Recipe.read(parsed.recipe, dict(parsed.set)), resume=parsed.resume)


def _convert_olmo_core(parsed: argparse.Namespace) -> None:
    from transformers_emo.conversion import convert_olmo_core

    config = convert_olmo_core(
        parsed.step_folder,
        parsed.out,
        dtype=parsed.dtype,
        max_shard_size=parsed.max_shard_size,
        tokenizer=parsed.tokenizer,
        verify=parsed.verify,
    )
    without = "" if parsed.tokenizer else "; without a tokenizer, which --tokenizer copies"
    print(f"{parsed.out}: {_layers(config)}{without}")


def _shard(parsed: argparse.Namespace) -> None:
    from transformers_emo.conversion import shard_experts

    files = shard_experts(
        parsed.model, parsed.out, experts_per_file=parsed.experts_per_file, **_hub_kwargs(parsed)
    )
    print(f"{parsed.out}: {len(files)} files of weights")


def _push(parsed: argparse.Namespace) -> None:
    from transformers_emo.subsets import push_folder

    commit = push_folder(parsed.folder, parsed.repo, private=parsed.private, revision=parsed.revision)
    print(commit.commit_url)


def _cache(parsed: argparse.Namespace) -> None:
    from transformers_emo.checkpoints.hub.names import existing_folder
    from transformers_emo.checkpoints.hub.part_cache import cached_parts, clear_parts

    if parsed.cache_dir is not None:
        existing_folder(parsed.cache_dir)
    if parsed.action == "clear":
        print(f"cleared {clear_parts(parsed.repo, parsed.cache_dir) / 1e6:.1f} MB")
        return
    parts = [part for part in cached_parts(parsed.cache_dir) if parsed.repo in (None, part.repo_id)]
    for part in parts:
        commits = ", ".join(commit[:8] for commit in part.commits)
        sizes = f"{part.present / 1e6:.1f} of {part.size / 1e6:.1f} MB"
        print(f"{part.repo_id}  {part.file}  {sizes}  ({commits})")
    print(f"{sum(part.present for part in parts) / 1e6:.1f} MB in parts of {len(parts)} files")


def _convert_to_olmo_core(parsed: argparse.Namespace) -> None:
    from transformers_emo.conversion import convert_to_olmo_core

    convert_to_olmo_core(
        parsed.model,
        parsed.out,
        original=parsed.original,
        settings=dict(parsed.set),
        verify=parsed.verify,
    )
    print(f"{parsed.out}: config.json and model_and_optim/")


def _upgrade(parsed: argparse.Namespace) -> None:
    from transformers_emo.conversion import upgrade_checkpoint

    config = upgrade_checkpoint(
        parsed.repo, parsed.out, settings=dict(parsed.set), link=parsed.link, **_hub_kwargs(parsed)
    )
    print(f"{parsed.out}: {_layers(config)}")


def _retention(parsed: argparse.Namespace) -> None:
    from transformers_emo.analysis import measure_retention, read_domains, topic_cosine, write_report
    from transformers_emo.analysis.plots import require_matplotlib
    from transformers_emo.analysis.retention import METHODS, SHARES

    models = dict(parsed.models)
    names = [name for name, _ in parsed.models]
    if len(models) < len(names):
        raise ValueError(f"The models are called {names}: give each a name of its own, NAME=FOLDER.")
    baseline = parsed.baseline or (names[-1] if len(names) > 1 else None)
    if baseline is not None and baseline not in models:
        raise ValueError(f"The baseline {baseline!r} is none of the models {names}.")
    if not parsed.no_plots:
        require_matplotlib()
    domains = read_domains(parsed.texts, parsed.domains, max_test=parsed.test)
    shares = parsed.shares or SHARES
    topics = {}

    def compare_topics(name, model, documents) -> None:
        topics[name] = topic_cosine(model, documents, batch_tokens=parsed.batch_tokens)

    measured = measure_retention(
        models,
        domains,
        parsed.out,
        methods=parsed.methods or METHODS,
        shares=shares,
        seeds=range(parsed.seeds),
        num_calibration=parsed.calibration,
        window=parsed.window,
        batch_tokens=parsed.batch_tokens,
        dtype=parsed.dtype,
        device=parsed.device,
        visit=None if parsed.no_topics or len(domains) < 2 else compare_topics,
    )
    print(
        write_report(
            measured,
            parsed.out,
            baseline=baseline,
            shares=shares,
            topics=topics,
            plots=not parsed.no_plots,
        )
    )


def _extract(parsed: argparse.Namespace) -> None:
    from transformers_emo.subsets import extract_subset

    revision = {} if parsed.revision is None else {"revision": parsed.revision}
    config = extract_subset(
        parsed.model,
        parsed.subset,
        parsed.out,
        max_shard_size=parsed.max_shard_size,
        dtype=parsed.dtype,
        **revision,
    )
    print(f"{parsed.out}: {_experts(config.layer_experts)} experts a layer")


def _write_back(parsed: argparse.Namespace) -> None:
    from transformers_emo.subsets import write_back

    result = write_back(
        parsed.full,
        parsed.tuned,
        out=parsed.out,
        what=parsed.what,
        weight=parsed.weight,
        check_root=not parsed.no_root_check,
        **({} if parsed.revision is None else {"revision": parsed.revision}),
    )
    averaged = f", {len(result.averaged)} of them averaged" if result.averaged else ""
    print(f"{parsed.out}: {len(result.written)} tensors and router rows written{averaged}")


def _layers(config: Any) -> str:
    """How many layers of how many experts a model has."""
    layers = config.layer_experts
    if all(layer.is_dense for layer in layers):
        return f"{len(layers)} dense layers"
    return f"{len(layers)} layers of {_experts(layers)} experts"


def _experts(layers: Sequence[Any]) -> str:
    """The numbers of experts, from the smallest to the largest where layers differ."""
    sizes = sorted({layer.num_experts for layer in layers if not layer.is_dense})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
