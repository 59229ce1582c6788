"""Errors that reach a user. Faults below us (disk, driver) are results, not exceptions."""

from __future__ import annotations


class FlexKVError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(FlexKVError, ValueError):
    """A setting is wrong or impossible on this machine. The message names the setting and the remedy."""


class IncompatibleError(FlexKVError, RuntimeError):
    """SGLang (its version, flags or model) cannot be served by this package. Says what to change."""
