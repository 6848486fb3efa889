"""The keys of maximal update parametrization: hyperparameters found at one width, used at another."""

from __future__ import annotations

from megatron.config.schema.base import Block, Bool, Float, Int, Section, key


class BaseShapes(Block):
    """The widths of the base model, as save_base_shapes writes them."""

    hidden_size: Int = key(..., "H of the base model.", gt=0)
    ffn_size: Int = key(..., "Its feed-forward width.", gt=0)
    num_attention_heads: Int = key(..., "Its attention heads.", gt=0)
    num_kv_heads: Int = key(..., "Its key and value heads.", gt=0)
    head_dim: Int = key(..., "The width of one of them.", gt=0)


class WidthSection(Section):
    """muP: one learning rate for all widths."""

    use_mup: Bool = key(
        False,
        "Maximal update parametrization (muP): attention scores are divided by the head dimension, outputs by the "
        "ratio of the widths, and initial values and learning rates of hidden matrices follow their fan-in, so "
        "that what was tuned on a narrow model fits a wide one. Needs base_shapes_file or mup_base_shapes.",
    )
    base_shapes_file: str | None = key(
        None, "The widths of the base model: a JSON file that save_base_shapes wrote (not upstream's pickles)."
    )
    save_base_shapes: Bool = key(
        False, "train.py writes the widths of this configuration's model to base_shapes_file, and ends."
    )
    mup_base_shapes: BaseShapes | None = key(
        None, "The widths of the base model in the YAML itself. Unset: those in base_shapes_file.", ours=True
    )
    coord_check: Bool = key(
        False,
        "train.py trains narrow models of several widths a few steps on one batch, with muP and without, prints how "
        "far activations move (under muP as far at every width), and ends.",
    )
    mup_width_scale: Int = key(
        2,
        "coord_check's widths grow by this factor. Upstream needs it to find out which dimensions are widths; here "
        "that is known by name.",
        ge=2,
        le=16,
    )
    mup_init_scale: Float = key(1.0, "With use_mup: all matrices start that much larger.", gt=0)
    mup_attn_temp: Float = key(
        1.0,
        "With use_mup: attention scores are divided by this as well as by the head dimension; 1 / sqrt(head_dim of the "
        "base model) makes the base model's attention the usual one. Upstream never read it.",
        gt=0,
    )
    mup_output_temp: Float = key(1.0, "With use_mup: logits are divided by this. Upstream never read it.", gt=0)
    mup_embedding_mult: Float = key(1.0, "With use_mup: word embeddings are multiplied with this.", gt=0)
    mup_rp_embedding_mult: Float = key(
        1.0, "With use_mup: learned or sinusoidal positions are multiplied with this.", gt=0
    )

    @property
    def ends_the_run(self) -> bool:
        """Whether train.py does something else than to train, which needs no data and no vocabulary."""
        return self.save_base_shapes or self.coord_check
