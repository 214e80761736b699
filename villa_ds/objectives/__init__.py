"""Objectives. One import line registers one."""

from villa_ds.objectives import itm, mlm, mrm, vcr, ve, vqa

__all__ = ["itm", "mlm", "mrm", "vcr", "ve", "vqa"]
