"""The public API says which types it takes and gives; mypy checks that they are right (.ci/run)."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
API = {"jet.py": ("JetConfig", "Jet", "dequantize", "quantize", "bits_per_dim"), "data.py": None, "evaluate.py": None}


def functions():
    """(file:function, its syntax) of the API: of a file what is named, or all that is public."""
    for file, names in API.items():
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (names is None or node.name in names):
                for part in node.body if isinstance(node, ast.ClassDef) else [node]:
                    if isinstance(part, ast.FunctionDef) and (part.name.startswith("__") or not part.name.startswith("_")):
                        yield f"{file}:{node.name}.{part.name}", part


FUNCTIONS = dict(functions())


def test_the_api_is_found():
    assert {"jet.py:Jet.sample", "jet.py:quantize.quantize", "data.py:load_images.load_images"} < FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_and_result_has_its_type(name):
    function = FUNCTIONS[name]
    parameters = function.args.args + function.args.kwonlyargs
    assert [one.arg for one in parameters if one.annotation is None and one.arg != "self"] == []
    assert function.returns is not None
