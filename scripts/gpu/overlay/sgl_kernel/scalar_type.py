"""Names of quantized number formats. SGLang lists them when it is imported; nothing here quantizes."""

from __future__ import annotations


class ScalarType:
    """A format, known by its name alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"ScalarType({self.name})"


class _ScalarTypes:
    def __getattr__(self, name: str) -> ScalarType:
        if name.startswith("__"):
            raise AttributeError(name)
        made = ScalarType(name)
        setattr(self, name, made)
        return made


scalar_types = _ScalarTypes()
