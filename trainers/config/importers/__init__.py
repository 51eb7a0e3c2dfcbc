"""Configs of other trainers as configs of this one; each trainer is a module with its tables."""

from __future__ import annotations

from trainers.config.importers.read import import_config

__all__ = ["import_config"]
