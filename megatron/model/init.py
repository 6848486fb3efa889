"""Which parameter starts from which distribution.

The draw itself, the same at every layout, is megatron.parallel.init's. Sources: normal and scaled_normal, Megatron-LM
(arXiv 1909.08053, section 3, after GPT-2); small_init, Nguyen & Salazar 2019 (arXiv 1910.05895, section 2.2);
wang_init, Wang & Komatsuzaki 2021, as used for GPT-J and GPT-NeoX-20B (arXiv 2204.06745, section 2.1); xavier, Glorot
& Bengio 2010 (equation 16); orthogonal, Saxe et al. 2013 (arXiv 1312.6120).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from megatron.model.soft_prompt import SOFT_PROMPT_WEIGHT
from megatron.model.spec import ModelSpec
from megatron.model.width_scaling import init_factor
from megatron.parallel.init import fill_from, named_generator
from megatron.parallel.process_groups import ProcessGroups

Draw = Callable[[torch.Tensor, torch.Generator], object]


def _normal(std: float) -> Draw:
    return lambda tensor, generator: torch.nn.init.normal_(tensor, 0.0, std, generator=generator)


def _uniform_by_width(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Of LoRA's first matrix: U(-1/sqrt(in), 1/sqrt(in)), as its authors' code and PEFT draw it."""
    bound = 1.0 / math.sqrt(tensor.shape[1])
    nn.init.uniform_(tensor, -bound, bound, generator=generator)


def _scaled(draw: Draw, factor: float) -> Draw:
    def scaled(tensor: torch.Tensor, generator: torch.Generator) -> None:
        draw(tensor, generator)
        tensor.mul_(factor)

    return draw if factor == 1.0 else scaled


def _prompt(spec: ModelSpec, draw_words: Draw, seed: int) -> Draw:
    """Of virtual tokens: the initial embeddings of the given words, or uniform."""
    prompt = spec.soft_prompt
    assert prompt is not None
    if not prompt.init_ids:
        return lambda tensor, generator: nn.init.uniform_(
            tensor, -prompt.init_range, prompt.init_range, generator=generator
        )
    words = torch.empty((spec.padded_vocab_size, spec.hidden_size), device="cpu")
    draw_words(words, named_generator(seed, "embedding.word_embeddings.weight"))
    return lambda tensor, generator: tensor.copy_(words[list(prompt.init_ids)] * spec.input_scale)


def draw_method(name: str, spec: ModelSpec) -> Draw:
    """The function that fills a logical tensor in place for the key `init_method` or `output_layer_init_method`.

    Raises ValueError for a name that is not among upstream's.
    """
    # With width scaling the base model's deviation is what the factors of single parameters start from.
    layers, hidden = spec.num_layers, spec.mup.hidden_size if spec.mup else spec.hidden_size
    scaled_std = spec.init_std / math.sqrt(2.0 * layers)
    methods: dict[str, Draw] = {
        "normal": _normal(spec.init_std),
        "scaled_normal": _normal(scaled_std),
        "single_residual_scaled_normal": _normal(spec.init_std / math.sqrt(layers)),
        "small_init": _normal(math.sqrt(2.0 / (5.0 * hidden))),
        "wang_init": _normal(2.0 / layers / math.sqrt(hidden)),
        "xavier_uniform": lambda t, g: nn.init.xavier_uniform_(t, generator=g),
        "xavier_normal": lambda t, g: nn.init.xavier_normal_(t, generator=g),
        "orthogonal": lambda t, g: nn.init.orthogonal_(t, gain=1.0, generator=g),
        "scaled_orthogonal": lambda t, g: nn.init.orthogonal_(t, gain=1.0 / math.sqrt(2.0 * layers), generator=g),
    }
    if name not in methods:
        raise ValueError(f"init method {name!r} is not one of {', '.join(sorted(methods))}")
    return methods[name]


def is_residual_output(name: str) -> bool:
    """Whether a weight writes into the residual stream, and so is drawn by `output_layer_init_method`."""
    return name.endswith(("attention.dense.weight", "mlp.linear2.weight"))


@torch.no_grad()
def initialize_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]], spec: ModelSpec, groups: ProcessGroups, seed: int
) -> None:
    """Fill every named parameter: matrices by the spec's methods, biases with 0, norms with a factor of 1.

    Parallel: each rank fills its own shard; the logical tensors depend on the seed and the names alone.
    """
    inner = draw_method(spec.init_method, spec)
    outer = draw_method(spec.output_init_method, spec)
    for name, parameter in parameters:
        if name.endswith(".lora.b"):
            parameter.fill_(0.0)
        elif name.endswith(".lora.a"):
            fill_from(parameter, name, _uniform_by_width, seed=seed, tp_rank=groups.tp_rank, tp_size=groups.tp_size)
        elif name == SOFT_PROMPT_WEIGHT:
            draw = _prompt(spec, _scaled(inner, spec.init_scale), seed)
            fill_from(parameter, name, draw, seed=seed, tp_rank=0, tp_size=1)
        elif name.endswith(".bias"):
            parameter.fill_(0.0)
        elif parameter.dim() == 1:
            parameter.fill_(0.0 if spec.norm_offset else 1.0)
        else:
            draw = _scaled(outer if is_residual_output(name) else inner, init_factor(name, spec))
            fill_from(parameter, name, draw, seed=seed, tp_rank=groups.tp_rank, tp_size=groups.tp_size)
