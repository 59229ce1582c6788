"""Runs pytest with another build of the C++ core: pytest_with_core.py CORE.so ARGUMENT..."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

import pytest

path, arguments = sys.argv[1], sys.argv[2:]
# Imported under its name before anybody asks for it, it is what everybody gets.
spec = importlib.util.spec_from_file_location("sglang_flexkv._core", path)
assert spec is not None
assert isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
sys.modules[spec.name] = core
sys.exit(pytest.main(arguments))
