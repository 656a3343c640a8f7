"""Every architecture that transformers' AutoModelForCausalLM maps, tiny and random: are its scores right?

    python -m tests.models.architectures                      # a table, some three minutes on one core
    python -m tests.models.architectures --only llama gemma   # of these
    python -m tests.models.architectures --write              # the table into pipeline/models/ARCHITECTURES.md

An error is the largest difference to brute force, relative to the largest score.
"""

import argparse
import re
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import pipeline
from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Unit, next_token_labels
from pipeline.influence.check_model import check_model
from pipeline.influence.micro_batch import MicroBatch
from pipeline.influence.table import scorer_of
from pipeline.models.experts import Router, is_experts
from pipeline.models.layers import layers_of
from pipeline.models.second_moments import SecondMoments
from pipeline.tasks.causal_lm import token_losses
from tests.models.tiny_configs import PAD, tiny_config

CPU = torch.device("cpu")
PAGE = Path(pipeline.__file__).parent / "models" / "ARCHITECTURES.md"
EXACT = 1e-4
"""An error below it is rounding: many models compute norms and attention in float32 whatever their weights are in."""
SAMPLES, TOKENS, WORDS = 4, 16, 200
LIMIT_S = 60

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "opt, word_embed_proj_dim": ("opt", {"word_embed_proj_dim": 16}),
    "falcon, new_decoder_architecture": ("falcon", {"new_decoder_architecture": True}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "doge, is_moe": ("doge", {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma4_text, enable_moe_block": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "stablelm, parallel residual and qk_layernorm": (
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "bert, is_decoder false": ("bert", {"is_decoder": False}),
    "xlm, causal false": ("xlm", {"causal": False}),
    "xlnet, attn_type bi": ("xlnet", {"attn_type": "bi"}),
}
"""Further members of a type: name, type, settings."""


class NotMadeError(Exception):
    """Why there is no tiny model of a type."""


@dataclass
class Cell:
    """What came of one comparison."""

    error: float | None = None
    said: str = ""
    """A refusal, or what broke."""
    state: str = "-"
    """exact, wrong, refused, crash, or - where it does not apply."""

    def __str__(self) -> str:
        if self.state == "exact":
            return f"{self.error:.0e}" if self.error is not None else "yes"
        if self.state == "wrong":
            return f"**{self.error:.2g}**" if self.error is not None else f"**{self.said}**"
        return {"refused": "refused", "crash": "**crash**"}.get(self.state, self.said or "-")


@dataclass
class Row:
    """One architecture."""

    name: str
    class_name: str = "-"
    dtype: str = "-"
    refusal: str = ""
    """Why it is not made, or not scored at all."""
    causal: str = "-"
    loss: Cell = field(default_factory=Cell)
    lai: Cell = field(default_factory=Cell)
    lli: Cell = field(default_factory=Cell)
    ghost: Cell = field(default_factory=Cell)
    adam: Cell = field(default_factory=Cell)
    padded: Cell = field(default_factory=Cell)
    residual: Cell = field(default_factory=Cell)
    share: str = "-"
    notes: list[str] = field(default_factory=list)

    @property
    def compared(self) -> dict[str, Cell]:
        """Those that brute force was compared with."""
        return {
            "lai": self.lai,
            "lli": self.lli,
            "ghost": self.ghost,
            "ghost, adam_state": self.adam,
            "ghost, pad id in use": self.padded,
        }

    @property
    def verdict(self) -> str:
        """The worst of all: not made, not causal, crash, wrong, refused or exact."""
        if self.causal == "-":
            return "not made"
        if self.causal == "no":
            return "not causal"
        states = {cell.state for cell in self.compared.values()}
        return next(state for state in ("crash", "wrong", "refused", "exact") if state in states)


def names() -> list[str]:
    """All types, and some variants."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def tiny_model(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """In training mode and without dropout; random weights, biases and gains, so that nothing is 0 or 1 by chance."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type, **changes), attn_implementation="eager", dtype=dtype
    )
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # others are for 16 and 32 bits only
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch_of(padded: bool = False) -> Batch:
    """Sequences without the padding id, or with it in the middle and at the end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(PAD + 1, WORDS, (SAMPLES, TOKENS), generator=generator)
    ids[0, 3:6] = ids[0, 0]
    ids[2, 1:4] = ids[0, 0]
    if padded:
        ids[:, ::5] = PAD
        ids[3, -4:] = PAD
    labels = next_token_labels(ids)
    labels[1, 9:] = IGNORE
    return Batch(ids, labels, [Unit(i, i, (i * TOKENS, (i + 1) * TOKENS), [i], "-") for i in range(SAMPLES)])


# What the pipeline says


def scores(model: PreTrainedModel, batch: Batch, second: SecondMoments | None = None, **settings: Any) -> Tensor:
    """Of one plain process, without a sketch; (U,)."""
    config = InfluenceConfig(sketch="none", precondition="adam_state" if second else "none", **settings)
    scorer = scorer_of(config, model, 3, CPU, Stopwatch(CPU), lambda tensor: tensor)
    if second:
        scorer.precondition(second)
    watched = MicroBatch(scorer, batch, Stopwatch(CPU))
    losses_BT = watched.forward(model)
    if scorer.after_backward:
        watched.before_backward(None)
        losses_BT.sum().backward()
        model.zero_grad()
    watched.add()
    return scorer.scores()[0].scores_U


# Brute force, one sample at a time


def logits_of(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits


def token_pair_scores(model: PreTrainedModel, batch: Batch, modules: Sequence[nn.Module], include_self: bool) -> Tensor:
    """Eq. 4: over all pairs of tokens, the inner products of their inputs in all `modules` times that of their logit
    gradients. Raises NotTokensError where a module is called with other rows than tokens."""
    inputs, feedback = [], []
    for ids_T, labels_T in zip(batch.input_ids_BT, batch.labels_BT, strict=True):
        with torch.no_grad(), calls_of(modules) as calls:
            logits_TV = logits_of(model, ids_T[None])[0].double()
        rows = [call.seen.flatten(0, -2).double() for module in modules for call in calls[module]]
        if others := [each for each in rows if len(each) != TOKENS]:
            raise NotTokensError(f"{len(others)} of {len(rows)} inputs of linear layers have no row for each token")
        labelled_T = labels_T != IGNORE
        onehot_TV = F.one_hot(labels_T.where(labelled_T, 0), logits_TV.shape[1])
        inputs.append(torch.cat(rows, dim=1))
        feedback.append((logits_TV.softmax(1) - onehot_TV) * labelled_T[:, None])
    a_ND, g_NV = torch.cat(inputs), torch.cat(feedback)
    pairs_NN = (a_ND @ a_ND.T) * (g_NV @ g_NV.T)
    return _scored(pairs_NN.view(SAMPLES, TOKENS, SAMPLES, TOKENS).sum((1, 3)), include_self)


class Call(NamedTuple):
    """Of a module."""

    seen: Tensor
    """A copy of its first argument,"""
    out: Any
    """what it returned,"""
    copy: Tensor | None
    """and a copy of that at once, if it is a tensor."""


@contextmanager
def calls_of(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Every call of these modules inside."""
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}

    def called(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        seen = (args or tuple(named.values()))[0].detach().clone()
        calls[module].append(Call(seen, out, out.detach().clone() if isinstance(out, Tensor) else None))

    handles = [module.register_forward_hook(called, with_kwargs=True) for module in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class NotTokensError(Exception):
    """Eq. 4 has no meaning: a linear layer's rows are no tokens."""


def gradients_of(model: PreTrainedModel, batch: Batch) -> list[dict[str, Tensor]]:
    """Of every sample's summed loss, alone in its batch, with respect to every trained weight that it uses."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = []
    for ids_T, labels_T in zip(batch.input_ids_BT, batch.labels_BT, strict=True):
        losses, _ = token_losses(logits_of(model, ids_T[None]), labels_T[None])
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()), allow_unused=True)
        found.append({name: each.double() for name, each in zip(weights, gradients, strict=True) if each is not None})
    return found


def inner_products(
    gradients: list[dict[str, Tensor]], claimed: set[str], include_self: bool, second: SecondMoments | None = None
) -> Tensor:
    """Of gradients of these weights, or of gradients over the fourth root of a rank-one second moment."""
    pairs_BB = torch.zeros(SAMPLES, SAMPLES, dtype=torch.float64)
    for name in sorted(claimed):
        if name not in gradients[0]:
            continue
        each = torch.stack([gradient[name] for gradient in gradients])
        if second:
            parts = (
                [second.means[name]]
                if each.dim() == 3
                else [second.means[f"{name}[{e}]"] for e in range(each.shape[1])]
            )
            scales = [(rows[:, None] * columns / rows.mean()).double() ** -0.25 for rows, columns in parts]
            each = each * (scales[0] if each.dim() == 3 else torch.stack(scales))
        pairs_BB += each.flatten(1) @ each.flatten(1).T
    return _scored(pairs_BB, include_self)


def _scored(pairs_BB: Tensor, include_self: bool) -> Tensor:
    return (pairs_BB if include_self else pairs_BB - pairs_BB.diag().diag()).sum(1)


def claimed_by(model: PreTrainedModel) -> set[str]:
    """Names of all weights that ghost says it scores."""
    return layers_of(model).weights


def random_second_moments(model: PreTrainedModel) -> SecondMoments:
    generator = torch.Generator().manual_seed(1)
    means = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            square = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) ** 4
            means[name] = (square.mean(1), square.mean(0))
        elif parameter.dim() == 3:
            square = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) ** 4
            means |= {f"{name}[{e}]": (one.mean(1), one.mean(0)) for e, one in enumerate(square)}
    return SecondMoments(means, 0.95, 3)


# Comparisons


def error_of(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def compared(*pairs: Callable[[], tuple[Tensor, Tensor]]) -> Cell:
    """The largest error of several scores and what they should be; or a refusal, if the pipeline itself raises a
    ValueError; or what broke."""
    errors = []
    for pair in pairs:
        try:
            errors.append(error_of(*pair()))
        except (TimeoutError, KeyboardInterrupt):
            raise
        except NotTokensError as error:
            return Cell(said=str(error), state="wrong")
        except Exception as error:
            return Cell(said=_first_sentence(error), state="refused" if _is_ours(error) else "crash")
    worst = max((error for error in errors), key=lambda error: (error != error, error))
    return Cell(worst, state="exact" if worst < EXACT else "wrong")


def _is_ours(error: Exception) -> bool:
    """Whether the pipeline refuses, rather than something in it breaking."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and Path(where).is_relative_to(Path(pipeline.__file__).parent)


def _first_sentence(error: BaseException) -> str:
    """Of an error, and where a crash came from."""
    said = " ".join(str(error).split())
    if isinstance(error, Exception) and _is_ours(error):
        return said
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    at = f" ({Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {said[:160]}{at}"


def compare_lai(model: PreTrainedModel, batch: Batch) -> Cell:
    def pair() -> tuple[Tensor, Tensor]:
        got = scores(model, batch, estimator="lai", include_self=False)
        modules = [
            module
            for module in model.modules()
            if isinstance(module, nn.Linear | Conv1D) or is_experts(module) or Router.fits(module)
        ]
        return got, token_pair_scores(model, batch, modules, include_self=False)

    return compared(pair)


def compare_lli(model: PreTrainedModel, batch: Batch) -> Cell:
    def pair() -> tuple[Tensor, Tensor]:
        got = scores(model, batch, estimator="lli", include_self=False)
        return got, token_pair_scores(model, batch, [model.get_output_embeddings()], include_self=False)

    return compared(pair)


def compare_ghost(model: PreTrainedModel, batch: Batch, gradients: list[dict[str, Tensor]], adam: bool) -> Cell:
    second = random_second_moments(model) if adam else None

    def pair(include_self: bool) -> tuple[Tensor, Tensor]:
        check_model(model)
        got = scores(model, batch, second, estimator="ghost", include_self=include_self)
        return got, inner_products(gradients, claimed_by(model), include_self, second)

    return compared(lambda: pair(False), lambda: pair(True))


def compare_loss(model: PreTrainedModel, batch: Batch) -> Cell:
    """transformers' own mean loss with ours. Its cell says so where the model's own is of another kind."""
    ids = batch.input_ids_BT
    labels = next_token_labels(ids)
    try:
        logits = logits_of(model, ids)
        try:
            own = model(input_ids=ids, labels=ids, use_cache=False).loss
        except ValueError:  # Git counts tokens of an image that there is not
            return Cell(said="its own raises")
        ours = token_losses(logits, labels)[0].sum() / (labels != IGNORE).sum()
        if own is None:
            return Cell(said="has none")
        if (error := error_of(own, ours)) < EXACT:
            return Cell(error, state="exact")
        if error_of(own, F.cross_entropy(logits.flatten(0, 1), ids.flatten())) < EXACT:
            return Cell(said="its own does not shift labels")
        if getattr(model.config, "ngram", 1) > 1:  # ProphetNet
            return Cell(said="its own is of several tokens ahead")
        return Cell(error, state="wrong")
    except (TimeoutError, KeyboardInterrupt):
        raise
    except Exception as error:
        return Cell(said=_first_sentence(error), state="crash")


def sees_the_future(model: PreTrainedModel, ids_BT: Tensor) -> bool:
    """Whether a later token changes an earlier position's logits."""
    changed, first = ids_BT.clone(), TOKENS // 2
    changed[:, first:] = (changed[:, first:] + 17) % (WORDS - PAD - 1) + PAD + 1
    with torch.no_grad():
        before, after = logits_of(model, ids_BT)[:, :first], logits_of(model, changed)[:, :first]
    return not error_of(after, before) < 1e-5


# One architecture


def examine(name: str) -> Row:
    """All of a row, whatever breaks on the way."""
    row, before = Row(name), torch.get_default_dtype()
    try:
        _fill(row, _made(row, name))
    except NotMadeError as error:
        row.refusal = str(error)
    finally:
        torch.set_default_dtype(before)
    return row


def _made(row: Row, name: str) -> PreTrainedModel:
    """The model with which a forward works, in float64 if it can."""
    said = ""
    row.class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[VARIANTS.get(name, (name, {}))[0]]
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            model = tiny_model(name, dtype)
            row.class_name = type(model).__name__
            with torch.no_grad():
                logits = logits_of(model, batch_of().input_ids_BT)
            if logits.dtype != dtype:  # float32 whatever the weights are in
                continue
            if logits.isfinite().all() and logits.shape[:2] == (SAMPLES, TOKENS):
                row.dtype = str(dtype).removeprefix("torch.")
                return model
            said = said or f"logits of shape {tuple(logits.shape)}, finite: {bool(logits.isfinite().all())}"
        except TimeoutError:
            raise NotMadeError(f"takes longer than {LIMIT_S} s") from None
        except Exception as error:
            said = NOT_MADE.get(name) or _first_sentence(error)
    raise NotMadeError(said)


def _fill(row: Row, model: PreTrainedModel) -> None:
    batch = batch_of()
    row.causal = "no" if sees_the_future(model, batch.input_ids_BT) else "yes"
    if row.causal == "no":
        row.refusal = "not causal"
        return
    row.loss = compare_loss(model, batch)
    row.lli = compare_lli(model, batch)
    row.lai = compare_lai(model, batch)
    gradients = gradients_of(model, batch)
    _take_notes(row, model, batch, gradients)
    row.ghost = compare_ghost(model, batch, gradients, adam=False)
    row.adam = compare_ghost(model, batch, gradients, adam=True)
    words = model.get_input_embeddings()
    if row.ghost.state != "refused" and getattr(words, "padding_idx", None) is not None:
        padded = batch_of(padded=True)
        gradients_padded = gradients_of(model, padded)
        row.padded = max(
            (compare_ghost(model, padded, gradients_padded, adam) for adam in (False, True)),
            key=lambda cell: (("exact", "refused", "wrong", "crash").index(cell.state), cell.error or 0.0),
        )
    row.residual = _residual(model, batch)
    _account(row, model, gradients)


def _residual(model: PreTrainedModel, batch: Batch) -> Cell:
    """Whether it can be had and runs; a guess has no truth to compare with."""
    try:
        got = scores(model, batch, estimator="residual", include_self=False)
        return Cell(state="exact") if got.isfinite().all() else Cell(said="not finite", state="wrong")
    except (TimeoutError, KeyboardInterrupt):
        raise
    except Exception as error:
        return Cell(said=_first_sentence(error), state="refused" if _is_ours(error) else "crash")


def _take_notes(row: Row, model: PreTrainedModel, batch: Batch, gradients: list[dict[str, Tensor]]) -> None:
    """What makes a model other than a head on blocks on an embedding: reasons for an error."""
    ids_BT, words, head = batch.input_ids_BT, model.get_input_embeddings(), model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    with torch.no_grad():
        with calls_of([*linear, words]) as calls:
            logits = logits_of(model, ids_BT)
        again, alone = logits_of(model, ids_BT), torch.cat([logits_of(model, ids_T[None]) for ids_T in ids_BT])
    if not error_of(again, logits) < 1e-6:
        row.notes.append("a second forward has other logits")
    if not error_of(alone, logits) < 1e-5:
        row.notes.append("a sample's logits depend on the others of its batch")
    if calls[words]:
        seen, out, copy = calls[words][0]
        row.notes += _between("word embedding", "its weight's rows", copy, words.weight[seen])
        row.notes += ["word embedding: its output is changed in place"] if out._version else []
    else:
        row.notes.append("the word embedding is never called")
    if calls.get(head):
        row.notes += _between("logits", "the head's output", logits, calls[head][0].copy)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights_called = {id(module.weight) for module in linear if calls[module]}
    odd: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if module not in calls or module is words:
            continue
        several = calls[module]
        if id(module.weight) not in weights_called and names[id(module.weight)] in gradients[0]:
            odd.setdefault("weight used without a call of its module", []).append(name)
        if len(several) > 1:
            odd.setdefault("called several times a forward", []).append(name)
        if any(call.copy is None for call in several):
            odd.setdefault("returns a tuple", []).append(name)
        if any(call.copy is not None and call.out._version for call in several):
            odd.setdefault("its output is changed in place", []).append(name)
        if any(call.seen.numel() // call.seen.shape[-1] != ids_BT.numel() for call in several):
            odd.setdefault("its rows are no tokens", []).append(name)
    row.notes += [f"{what}: {_some(modules)}" for what, modules in odd.items()]


def _between(left: str, right: str, found: Tensor, plain: Tensor) -> list[str]:
    """How one is made of the other."""
    found, plain = found.detach().double(), plain.detach().double()
    if found.numel() == plain.numel():
        found = found.reshape(plain.shape)
    if found.shape != plain.shape:
        return [f"{left}: {_shape(found)} of {right}, {_shape(plain)}"]
    factor = float((found * plain).sum() / plain.square().sum())
    if error_of(found, plain) < 1e-5:
        return []
    if error_of(found, factor * plain) < 1e-5:
        return [f"{left}: {right} times {factor:.3g}"]
    return [f"{left}: a function of {right}"]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _account(row: Row, model: PreTrainedModel, gradients: list[dict[str, Tensor]]) -> None:
    """Which share of the trained numbers is scored, and which are not."""
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    every = sum(trained.values())
    unused = set(trained) - set(gradients[0])
    if unused:
        row.notes.append(f"{sum(trained[name] for name in unused) / every:.0%} of its numbers have no part in text")
    try:
        found = layers_of(model)
    except ValueError as error:
        row.refusal = str(error)
        return
    claimed = claimed_by(model)
    row.share = f"{sum(trained[name] for name in claimed) / every:.1%}"
    left: Counter[str] = Counter()
    for name, rule in found.left_out.items():
        left[rule] += trained[name]
    row.notes += [f"left out: {rule} ({numbers / every:.1%})" for rule, numbers in left.items()]
    if missed := sorted(set(trained) - claimed - set(found.left_out)):
        row.notes.append(f"in no account: {_some(missed)}")


NOT_MADE = {
    "gemma3n": "its vision tower is timm's, which is not installed (gemma3n_text is its language model)",
    "gemma4_assistant": "drafts for another model: has no input but that one's states",
    "gemma4_unified_assistant": "drafts for another model: has no input but that one's states",
    "musicgen": "the class wants the config of its decoder, which has another type; words are audio codes",
    "musicgen_melody": "the class wants the config of its decoder, which has another type; words are audio codes",
}
"""Reasons that an error message would not tell."""


# The table

HEADER = (
    "type",
    "class",
    "dtype",
    "causal",
    "loss",
    "lai",
    "lli",
    "ghost",
    "ghost, adam_state",
    "ghost, pad id in use",
    "residual",
    "scored",
    "notes",
)


def cells(row: Row) -> list[str]:
    said = [f"{name}: {cell.said}" for name, cell in row.compared.items() if cell.said and cell.said != row.refusal]
    if row.residual.said and row.residual.said != row.refusal:
        said.append(f"residual: {row.residual.said}")
    if row.loss.said:
        said.append(f"loss: {row.loss.said}")
    refusal = [_shorter(row.refusal)] if row.refusal else []
    notes = "; ".join(dict.fromkeys([*refusal, *map(_shorter, said), *row.notes]))
    made = [row.name, row.class_name, row.dtype, row.causal]
    middle = [row.loss, row.lai, row.lli, row.ghost, row.adam, row.padded, row.residual]
    return [*made, *(str(cell) for cell in middle), row.share, notes.replace("|", "/")]


def _shorter(said: str) -> str:
    """Without the remedy."""
    return re.split(r"\. Choose |, which estimator|; choose ", said)[0]


def reasons(row: Row) -> set[str]:
    """Of its refusals, the same for all of a kind."""
    if row.verdict in ("not made", "not causal"):
        return {row.refusal}
    found = {}
    for name, cell in {**row.compared, "residual": row.residual}.items():
        if cell.state == "refused":
            found.setdefault(_kind_of(row, cell.said), name)
    return {f"{said} ({name})" if name == "residual" else said for said, name in found.items()}


def _kind_of(row: Row, said: str) -> str:
    if "are no linear layer" in said:
        return "trains weights that are no linear layer and no embedding: experts, routers, convolutions, state spaces"
    return _shorter(said).replace(f"{row.class_name} ", "")


def summary(rows: Sequence[Row]) -> list[str]:
    """Counts, for the top of the page."""
    lines = [f"{len(rows)} architectures of transformers {transformers.__version__}.", ""]
    verdicts = Counter(row.verdict for row in rows)
    lines += ["| lai, lli and ghost | architectures |", "|---|---|"]
    meaning = {
        "exact": "all exact",
        "refused": "one at least refused, the others exact",
        "wrong": "a wrong score, and nothing said",
        "crash": "a traceback",
        "not causal": "not causal",
        "not made": "no tiny model of it",
    }
    lines += [f"| {said} | {verdicts[verdict]} |" for verdict, said in meaning.items()]
    lines += ["", "| | exact | refused | wrong | crash | does not apply |", "|---|---|---|---|---|---|"]
    scored = [row for row in rows if row.causal == "yes"]
    kinds: dict[str, list[Cell]] = {name: [row.compared[name] for row in scored] for name in Row("").compared}
    kinds |= {"residual (to be had)": [row.residual for row in scored], "loss": [row.loss for row in scored]}
    for name, several in kinds.items():
        states = Counter(cell.state for cell in several)
        counts = [states[state] for state in ("exact", "refused", "wrong", "crash", "-")]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    every = Counter(reason for row in rows for reason in reasons(row))
    lines += ["", "| refused or not made, and why | architectures |", "|---|---|"]
    return lines + [f"| {said} | {count} |" for said, count in every.most_common()]


def table(rows: Sequence[Row]) -> list[str]:
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    return lines + ["| " + " | ".join(cells(row)) + " |" for row in rows]


INTRODUCTION = f"""# Architectures

Written by `python -m tests.models.architectures --write`: every type that transformers' AutoModelForCausalLM maps, as a
tiny random model. Errors are relative to the largest score; above {EXACT:.0e} they are bold. `lai` and `lli` are
compared with Eq. 4 over token pairs, `ghost` with autograd, one sample at a time, over the weights that it claims, with
self-influence and without. `residual` is a guess: it is to be had or not. Multipliers and caps that are 1 or none by
default are set to something else.
"""


def page(rows: Sequence[Row]) -> str:
    return "\n".join([INTRODUCTION, *summary(rows), "", *table(rows), ""])


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, or names of variants")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    chosen = options.only or names()
    if unknown := set(chosen) - set(names()):
        sys.exit(f"no such type: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    rows = []
    print("\n".join(table([])), flush=True)
    for name in chosen:
        try:
            with _at_most(LIMIT_S):
                row = examine(name)
        except TimeoutError as error:
            row = Row(name, refusal=str(error))
        except Exception as error:
            row = Row(name, refusal=_first_sentence(error), causal="yes", ghost=Cell(said="", state="crash"))
        rows.append(row)
        print(table([row])[-1], flush=True)
    print("", *summary(rows), sep="\n")
    if options.write:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
