"""Runs pytest with another build of the C++ core: pytest_with_core.py FOLDER ARGUMENT..."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest

folder, arguments = Path(sys.argv[1]), sys.argv[2:]
# Imported under their names before anybody asks for them, they are what everybody gets.
for name in ("sglang_flexkv._core", "sglang_flexkv_testing"):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name.split('.')[-1]}.so")
    assert spec is not None
    assert isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
sys.exit(pytest.main(arguments))
