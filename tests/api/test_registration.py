"""Importing the package is all it takes, once or twice."""

import subprocess
import sys
from pathlib import Path

import fresh_processes
import import_order
import pytest
import transformers_emo
from transformers import AutoModel
from transformers.integrations import moe
from transformers_emo import EmoConfig, EmoPreTrainedModel
from transformers_emo.modeling_emo import modeling_emo
from transformers_emo.registration import register


def test_importing_the_package_imports_neither_transformers_nor_torch():
    """Nor does the command, to say what it can do: help comes at once."""
    code = (
        "import sys, transformers_emo\n"
        "from transformers_emo.cli import main\n"
        "for words in ['--version'], ['--help'], ['select', '--help'], ['convert', 'upgrade', '--help']:\n"
        "    assert main(words) == 0\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'pydantic', 'yaml'}\n"
        "print(heavy & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert (lines[0], lines[-1]) == (f"emo {transformers_emo.__version__}", "set()")


def in_a_fresh_process(function: str, *arguments: str) -> None:
    code = "import sys; sys.path.append(sys.argv[1]); import import_order; "
    code += f"import_order.{function}(*sys.argv[2:])"
    done = fresh_processes.run(code, str(Path(import_order.__file__).parent), *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", [*import_order.LIGHT, *import_order.ORDERS])
def test_every_order_of_imports_registers_everything(order):
    in_a_fresh_process("one_after_another", order)


def test_imports_in_several_threads_at_once_register_everything():
    in_a_fresh_process("all_at_once")


def test_modules_of_the_network_get_their_kernels_by_the_name_they_ask_for():
    assert EmoPreTrainedModel._cpu_experts in moe.ALL_EXPERTS_FUNCTIONS


def test_an_auto_class_tells_why_the_network_cannot_be_imported(monkeypatch):
    """Not that there is none, as after the `KeyError` of a lookup."""
    monkeypatch.delattr(modeling_emo, "EmoModel")
    register()
    try:
        with pytest.raises(ImportError, match="Cannot import EmoModel from .*modeling_emo: AttributeError"):
            AutoModel.from_config(EmoConfig(num_hidden_layers=1))
    finally:
        monkeypatch.undo()
        register()


def test_registering_again_changes_nothing():
    before = list(sys.meta_path), dict(AutoModel._model_mapping._extra_content)
    register()
    assert (list(sys.meta_path), dict(AutoModel._model_mapping._extra_content)) == before


def test_public_names_are_there():
    assert all(hasattr(transformers_emo, name) for name in transformers_emo.__all__)
