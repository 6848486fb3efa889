"""Floating-point operations of one training token, a term for each matrix product.

A product of [m, k] and [k, n] costs 2 m k n. The backward pass costs twice the forward pass: one product for the
input's gradient, one for the weight's. Per token and layer, with H hidden, D head width, N and G query and kv heads, F
feed-forward width, S sequence, V vocabulary rows:

    query_key_value   2 H (N + 2 G) D
    scores            2 S N D            q k^T; counted over the whole sequence, as is usual in utilisation figures,
    weighted_values   2 S N D            although causal kernels skip about half of both
    attention_output  2 N D H
    feed_forward      2 H F * 2          * 3 with a gated activation
    vocabulary        2 H V              once, not per layer

A frozen weight has no gradient, and before the first parameter that learns nothing has one: these products are not
counted (`gradients`). Norms, rotations, activations, the softmax and the optimizer are left out; recomputed activations
are not counted, so a utilisation made from this is that of the model (MFU), not of the hardware. Low-rank updates are
a term of their own, 2 R (in + out) for each layer that has one; a head of labels is the term labels, 2 H labels. A soft
prompt makes S longer, and each token of the text bears its share of what its virtual tokens cost. Invariant: no term
depends on the layout.
Source: Kaplan et al. 2020 (arXiv 2001.08361) section 2.1 and Chowdhery et al. 2022 (arXiv 2204.02311) appendix B.
"""

from __future__ import annotations

from megatron.config.plan.job import layers_of
from megatron.config.resolved import Config


def flops_terms(config: Config) -> dict[str, int]:
    """Forward FLOPs of one token over all layers, by term. Raises: ConfigError if the vocabulary is not known."""
    return _summed(config, backward=False)


def step_flops_terms(config: Config) -> dict[str, int]:
    """FLOPs of one training token, forward and backward, by term. Raises: as flops_terms."""
    return _summed(config, backward=True)


def flops_per_token(config: Config) -> int:
    """FLOPs of one training token, forward and backward, over all devices together."""
    return sum(step_flops_terms(config).values())


def _summed(config: Config, *, backward: bool) -> dict[str, int]:
    total: dict[str, int] = {}
    text, virtual = config.model.seq_length, config.tuning.num_virtual_tokens
    for layer in layers_of(config):
        for name, count in (*layer.flops, *(layer.backward if backward else ())):
            # The blocks work on virtual tokens too, which are spread over those of the text; the head does not.
            passed = count if layer.name == "head" else count * (text + virtual) // text
            total[name] = total.get(name, 0) + passed
    return total
