"""A training step beside the same model written as a textbook writes it, and beside Hugging Face's BERT.

    python benchmarks/step.py --preset uniter-base --rows 8 --rounds 5

All take turns on the same batch (`alternating.py`). With `--dropout 0` the textbook model's gradients are checked
against ours first. `products alone` are the step's own matrix products at the same shapes. The adversarial step stands
beside VILLA's released loop on the textbook model. BERT (only if `transformers` is installed) gets the same number of
rows and positions as ready embeddings. Utilisation is the products' floating point operations by time, over the
machine's best rate for a large product.
"""

import argparse
from collections.abc import Callable
from typing import Any

import record
import torch
from alternating import alternate, peak_memory
from products import alone, peak_flops, products_of
from textbook import TextbookPasses, TextbookUniter
from workload import ANSWERS, batch_of, engine_of, mixed_lengths, vqa_objective, without_dropout

from villa_ds.batch import Batch
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig
from villa_ds.models.presets import BackboneSizes
from villa_ds.objectives.base import Objective
from villa_ds.train.adversary import Adversary
from villa_ds.train.step import StepInput, adversarial_step, train_step
from villa_ds.train.torch_engine import TorchEngine

TOLERANCE = 1e-5  # of gradients in float32, relative


def bert_step(sizes: BackboneSizes, batch: Batch) -> Callable[[], object] | None:
    """A step of Hugging Face's encoder of the same size, with a classifier on [CLS]; None without the package."""
    try:
        from transformers import BertConfig, BertModel  # noqa: PLC0415
    except ImportError:
        return None
    config = BertConfig(
        hidden_size=sizes.hidden_size, num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads, intermediate_size=sizes.intermediate_size,
        hidden_dropout_prob=sizes.hidden_dropout_prob, attention_probs_dropout_prob=sizes.attention_probs_dropout_prob,
        vocab_size=sizes.vocabulary_size,
    )  # fmt: skip
    model = BertModel(config).train()
    head = torch.nn.Linear(sizes.hidden_size, ANSWERS)
    positions = torch.arange(batch.joint_length)
    mask = (positions < (batch.text_lengths + batch.region_counts)[:, None]).long()
    embeddings = torch.randn(len(batch), batch.joint_length, sizes.hidden_size)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        head.zero_grad(set_to_none=True)
        logits = head(model(inputs_embeds=embeddings, attention_mask=mask).pooler_output)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.targets["scores"]).backward()

    return run


def check_same(engine: TorchEngine, work: StepInput, textbook: TextbookUniter, batch: Batch) -> float:
    """Largest relative difference of a gradient; raises where the two models are not the same."""
    engine.discard()
    train_step(engine, work)
    textbook.zero_grad(set_to_none=True)
    textbook(batch).loss.backward()
    reference = TextbookUniter(engine.module.backbone.sizes, ANSWERS)
    worst = 0.0
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                parameter.data, parameter.grad = parameter.grad, parameter.data  # to send gradients through `load`
        reference.load(engine.module)
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                parameter.data, parameter.grad = parameter.grad, parameter.data
        gradients = dict(reference.named_parameters())
        for name, parameter in textbook.named_parameters():
            if parameter.grad is not None and "mask_embedding" not in name:
                difference = (parameter.grad - gradients[name]).norm() / parameter.grad.norm().clamp(min=1e-12)
                # a key's bias has no influence on attention: its gradient is rounding alone
                worst = worst if ".key.bias" in name else max(worst, float(difference))
    if worst > TOLERANCE:
        raise RuntimeError(f"the textbook model is another one: a gradient differs by {worst:.1e}")
    return worst


def other_engines(options: argparse.Namespace, objective: Objective, rates: dict[str, float]) -> dict[str, TorchEngine]:
    """The same model under other settings of the engine, by what they are called."""
    wanted = {"bfloat16": EngineConfig(precision="bfloat16")} if options.bfloat16 else {}
    wanted |= {"compiled": EngineConfig(compile=True)} if options.compile else {}
    return {
        label: engine_of(options.preset, objective, options.threads, settings, **rates)
        for label, settings in wanted.items()
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="uniter-base")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--words", type=int, default=14)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--mixed", action="store_true", help="rows of a length bucket instead of equal ones")
    parser.add_argument("--dropout", type=float, default=None, help="default: the preset's")
    parser.add_argument("--bfloat16", action="store_true", help="a step with 16-bit weights too")
    parser.add_argument("--compile", action="store_true", help="steps with engine.compile=true too")
    parser.add_argument("--steps", type=int, default=3, help="K of the adversarial steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Measure and write the record."""
    options, started = arguments(), record.environment()
    objective = vqa_objective()
    rates = {} if options.dropout is None else dict.fromkeys(without_dropout(), options.dropout)
    engine = engine_of(options.preset, objective, options.threads, **rates)
    lengths = mixed_lengths(options.rows) if options.mixed else [(options.words, options.regions)] * options.rows
    batch = batch_of(objective, lengths)
    work = StepInput(1, 0, objective, (batch,), (0,))
    sizes = engine.module.backbone.sizes
    textbook = TextbookUniter(sizes, ANSWERS).load(engine.module).train()
    difference = check_same(engine, work, textbook, batch) if options.dropout == 0 else None
    adversary = {"text": ModalityConfig(1e-3), "image": ModalityConfig(1e-3), "steps": options.steps}
    released = AdversaryConfig(**adversary, schedule="textbook", dropout="independent")
    widths = (sizes.hidden_size, sizes.feature_width)

    def released_step() -> None:
        passes = TextbookPasses(textbook, batch)
        Adversary(released).accumulate(passes, batch, objective.divergence, widths, seed=0)

    def textbook_step() -> None:
        textbook(batch).loss.backward()

    engine.discard()
    products = products_of(lambda: train_step(engine, work))
    runs: dict[str, Callable[[], object]] = {
        "step": lambda: train_step(engine, work),
        "step of the textbook model": textbook_step,
        "products alone": alone(products),
        "adversarial step": lambda: adversarial_step(engine, work, Adversary(AdversaryConfig(**adversary)), 1.0),
        "released adversarial loop on the textbook model": released_step,
    }
    others = other_engines(options, objective, rates)
    for label, other in others.items():
        runs[f"step, {label}"] = lambda other=other: train_step(other, work)
        runs[f"adversarial step, {label}"] = lambda other=other: adversarial_step(
            other, work, Adversary(AdversaryConfig(**adversary)), 1.0
        )
    bert = bert_step(sizes, batch)
    if bert is not None:
        runs["step of Hugging Face's BERT"] = bert

    def clear() -> None:
        for each in (engine, *others.values()):
            each.discard()
        textbook.zero_grad(set_to_none=True)

    times = alternate(runs, options.rounds, before=clear)
    memory = {}
    for name, run in runs.items():
        clear()
        memory[name] = peak_memory(run)
    peak, flops = peak_flops(), sum(product.flops for product in products)
    figures: dict[str, Any] = {
        "real_tokens": batch.tokens,
        "padding_share": 1 - batch.tokens / (len(batch) * batch.joint_length),
        "tokens_per_processor_second": batch.tokens / times.median("step"),
        "flops_of_a_step": flops,
        "machine_peak_flops": peak,
        "utilisation": flops / times.median("step") / peak / options.threads,
        "gradient_difference_to_textbook": difference,
        "ratios_to_step": {name: times.ratio(name, "step") for name in runs},
        "adversarial_released_over_ours": times.ratio(
            "released adversarial loop on the textbook model", "adversarial step"
        ),
        "step_over_products_alone": times.ratio("step", "products alone"),
    }
    for name in runs:
        mebibytes = "" if memory[name] is None else f"{memory[name] / 2**20:8.0f} MiB at its peak"
        print(f"{name:50}{times.median(name):8.3f} s{figures['ratios_to_step'][name]:7.2f} steps {mebibytes}")
    for name, value in figures.items():
        if not isinstance(value, dict):
            print(f"{name:50}{value if value is None else format(value, '.4g')}")
    parts = [options.preset, "mixed" if options.mixed else "equal"]
    parts += [] if options.dropout is None else [f"dropout-{options.dropout:g}"]
    parts += [f"{options.threads}-threads"] if options.threads > 1 else []
    content = {**started, "options": vars(options), **figures, "peak_bytes": memory, **times.to_dict()}
    print(f"written to {record.write('step/' + '-'.join(parts), content)}")


if __name__ == "__main__":
    main()
