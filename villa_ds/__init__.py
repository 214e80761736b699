"""VILLA adversarial pre-training and fine-tuning of vision-and-language transformers on DeepSpeed ZeRO engines."""

__version__ = "0.1.0"
