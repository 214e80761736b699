"""Backbones. One import line registers one."""

from villa_ds.models import uniter

__all__ = ["uniter"]
