"""The options that say what a student matches, and on which texts."""

import functools
from typing import Any

import click

from onnxpress.cli.options import Command, pack_option

# by name, so that --help imports no torch; a test holds it to the table in compress/loss_table.py
LOSS_NAMES = (
    "logits", "reverse-kl", "jsd", "logits-mse", "hard", "hidden", "hidden-cosine", "attention",
    "relations", "embedding", "similarity", "contrastive",
)  # fmt: skip


def loss_options(command: Command) -> Command:
    """Add --losses and the numbers in their formulas; the command takes `matching`, a dict."""

    @click.option(
        "--losses",
        default="",
        help=f"Names with weights, as in embedding=1,hidden=0.5: {', '.join(LOSS_NAMES)}.",
    )
    @click.option(
        "--temperature", type=float, default=3.0, show_default=True, help="Of softened logits."
    )
    @click.option(
        "--alpha",
        type=float,
        help="Weight of logits, reverse-kl and jsd against the labels' loss; 0.7 where there are "
        "labels.",
    )
    @click.option(
        "--beta", type=float, default=0.5, show_default=True, help="The teacher's share in jsd."
    )
    @click.option(
        "--layer-map",
        default="uniform",
        show_default=True,
        help="Which layers hidden, hidden-cosine and attention compare: uniform, last, or "
        "student:teacher as in 0:1,2:5; -1 is the embeddings.",
    )
    @click.option(
        "--relation-map",
        default="last",
        show_default=True,
        help="Which layers relations compares: last, or as --layer-map.",
    )
    @click.option(
        "--relation-heads", type=int, default=0, help="Heads of relations; 0: as many as fit."
    )
    @click.option(
        "--contrast-temperature",
        type=float,
        default=0.05,
        show_default=True,
        help="Of the cosines in contrastive.",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        losses: str,
        temperature: float,
        alpha: float | None,
        beta: float,
        layer_map: str,
        relation_map: str,
        relation_heads: int,
        contrast_temperature: float,
        **kwargs: Any,
    ) -> Any:
        matching = {
            "losses": tuple(part.strip() for part in losses.split(",") if part.strip()),
            "temperature": temperature,
            "alpha": alpha,
            "beta": beta,
            "layer_map": layer_map,
            "relation_map": relation_map,
            "relation_heads": relation_heads,
            "contrast_temperature": contrast_temperature,
        }
        return command(*args, matching=matching, **kwargs)

    return wrapped


def text_options(command: Command) -> Command:
    """Add --pack and --generate; the command takes `pack` and `generate`, settings or None."""

    @pack_option
    @click.option(
        "--generate",
        "new_tokens",
        type=int,
        help="Train on the teacher's own words: this many new tokens after each text's beginning, "
        "or in answer to it.",
    )
    @click.option(
        "--prompt-tokens",
        type=int,
        default=16,
        show_default=True,
        help="--generate: how long a text's beginning is.",
    )
    @click.option(
        "--generate-temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="--generate: 0 takes the likeliest token, above 0 samples.",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        new_tokens: int | None,
        prompt_tokens: int,
        generate_temperature: float,
        **kwargs: Any,
    ) -> Any:
        settings = {
            "new_tokens": new_tokens,
            "prompt_tokens": prompt_tokens,
            "temperature": generate_temperature,
        }
        return command(*args, generate=settings if new_tokens is not None else None, **kwargs)

    return wrapped
