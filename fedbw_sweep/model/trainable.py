"""Which parameters train and travel: the others stay what they were at the start, and never do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from fedbw_sweep.compression.layout import Layout
from fedbw_sweep.config.groups import ModelConfig, TrainableBlocks, TrainableConfig, TrainableLora
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.adapters import add_adapters
from fedbw_sweep.model.architecture import token_embedding
from fedbw_sweep.model.build import build_model, build_without_weights
from fedbw_sweep.model.tokenizer import load_tokenizer
from fedbw_sweep.model.vector import frozen_parameters, layout_of


def build_trainable(model: ModelConfig, trainable: TrainableConfig, seed: int) -> PreTrainedModel:
    """Build a run's model and freeze what does not train; see `build_model` and `freeze`."""
    built = build_model(model, seed)
    freeze(built, trainable, seed)
    return built


def freeze(model: PreTrainedModel, trainable: TrainableConfig, seed: int) -> None:
    """Freeze what does not train, in place; ``lora`` adds what does.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM.
    trainable : TrainableConfig
        The choice. A parameter that is used twice, as tied embeddings are, trains if either use is
        chosen.
    seed : int
        The run's seed; the adapters' initial weights are drawn from it.

    Raises
    ------
    ConfigError
        If the model has nothing of what is chosen.
    """
    if isinstance(trainable, TrainableLora):
        add_adapters(model, trainable, seed)
        return
    parameters: Iterable[nn.Parameter]
    if isinstance(trainable, TrainableBlocks):
        parameters = _last_blocks(model, trainable.blocks)
    else:
        parameters = _CHOICES[trainable.name](model)
    chosen = {id(parameter) for parameter in parameters}
    if not chosen:
        raise ConfigError(
            "trainable",
            trainable.name,
            f"{type(model).__name__} has no such parameters; choose another part, all or lora",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def shapes(config: RunConfig) -> tuple[Layout, int, int | None]:
    """Derive the layout of what travels in a run, the bytes of what is frozen, and the positions.

    Where the weights lie in a folder they are loaded: which of them are tied is known from them
    alone. Else shapes are enough.

    Returns
    -------
    layout : Layout
    frozen_bytes : int
    positions : int or None
        Rows of the model's table of positions; None where it has none.

    Raises
    ------
    ConfigError
        If the model cannot be loaded, has fewer rows than there are byte tokens, or nothing of what
        is chosen.
    """
    given = config.model
    if given.weights == "pretrained" and Path(given.name_or_path or "").is_dir():
        model = build_model(given, config.seed)
    else:
        model = build_without_weights(given)
    if given.weights == "random" and given.architecture is not None:
        load_tokenizer(given)  # has a word on the vocabulary
    positions = _positions(model)
    freeze(model, config.trainable, config.seed)
    return layout_of(model), 4 * frozen_parameters(model), positions


def _positions(model: PreTrainedModel) -> int | None:
    """Count the positions of which a table has a row; some tables have one or two rows more."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = token_embedding(model)
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return most if most and any(t.num_embeddings - most in (0, 1, 2) for t in tables) else None


def _head(model: PreTrainedModel) -> Iterable[nn.Parameter]:
    """Choose the output embedding, which is the input's as well where they are tied."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return () if head is None else head.parameters()


def _biases(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Choose every bias (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199).

    A bias is a parameter that is added to what a layer computes. It is known by the word in its
    name, be that ``bias``, ``dense_bias`` or ``in_proj_bias``. What the model itself never trains,
    as some routers' corrections, stays frozen.
    """
    return (
        parameter
        for name, parameter in model.named_parameters()
        if "bias" in name.rpartition(".")[2].split("_") and parameter.requires_grad
    )


def _norms(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Choose the gains, and biases if there are any, of LayerNorm, RMSNorm and the like."""
    norms = (module for module in model.modules() if "Norm" in type(module).__name__)
    return (parameter for norm in norms for parameter in norm.parameters(recurse=False))


def _body(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Choose all but the embeddings: of tokens, of positions, and the output's."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(p) for module in embeddings for p in module.parameters()}
    left_out |= {id(p) for p in _head(model)}
    return (parameter for parameter in model.parameters() if id(parameter) not in left_out)


def _last_blocks(model: PreTrainedModel, count: int) -> Iterator[nn.Parameter]:
    """Choose the last transformer blocks, without the norm after them."""
    there = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = next((blocks for blocks in lists if there and len(blocks) == there), None)
    if blocks is None:
        raise ConfigError(
            "trainable", "last_n", f"{type(model).__name__} has no list of transformer blocks"
        )
    if count > there:
        raise ConfigError(
            "trainable.blocks", count, f"{type(model).__name__} has {there}; give 1 to {there}"
        )
    return (parameter for block in list(blocks)[-count:] for parameter in block.parameters())


_CHOICES: dict[str, Callable[[PreTrainedModel], Iterable[nn.Parameter]]] = {
    "all": nn.Module.parameters,
    "head": _head,
    "bias": _biases,
    "norm": _norms,
    "body": _body,
}
