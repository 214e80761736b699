"""Objectives. One import line registers one."""

from villa_ds.objectives import gqa, itm, mlm, mrm, nlvr2, refexp, retrieval, vcr, ve, vqa

__all__ = ["gqa", "itm", "mlm", "mrm", "nlvr2", "refexp", "retrieval", "vcr", "ve", "vqa"]
