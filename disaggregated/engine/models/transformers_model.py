"""`model_impl: transformers`: any causal model of the transformers library, computed by its own code.

What it computes with is ours where it matters: attention goes through the paged pool, and every linear through the op
table, so that a row does not depend on its batch mates. All sequences of a step are one row of tokens to the library,
which numbers them by position; only attention knows that they are several.

Legend as in `ops/api.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from disaggregated.engine.layer_progress import LayerProgress
from disaggregated.engine.models import transformers_attention
from disaggregated.engine.models.transformers_attention import RunningStep, running
from disaggregated.engine.models.transformers_config import library, read_theirs
from disaggregated.engine.ops.api import AttentionBatch, LayerPool, Ops
from disaggregated.errors import ModelUnavailable

DUMMY_SEED: Final = 0
_LANES: Final = 64
"""More than the numbers of any vector register."""
_ACTIVATIONS: Final = ("torch.nn.modules.activation", "transformers.activations")


class TransformersModel:
    """Implements `Model`."""

    def __init__(self, theirs: Any, ops: Ops) -> None:
        self._ops = ops
        self._theirs = theirs
        self._body = theirs.base_model
        self._given = _GivenHidden()
        setattr(theirs, theirs.base_model_prefix, self._given)
        _replace_modules(self._body, ops)
        _replace_modules(theirs, ops)

    @property
    def ops(self) -> Ops:
        return self._ops

    @property
    def decode(self) -> None:
        return None

    def forward(
        self,
        token_ids_T: torch.Tensor,
        batch: AttentionBatch,
        pools: Sequence[LayerPool],
        progress: LayerProgress | None = None,
    ) -> torch.Tensor:
        """(T, H): hidden states, whatever the library's model gives to its output head."""
        step = RunningStep(batch=batch, pools=pools, ops=self._ops, progress=progress)
        with running(step):
            out = self._body(
                input_ids=token_ids_T.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False
            )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """(R, V): by the library's own code behind the hidden states, which knows its scales and softcaps."""
        self._given.hidden = hidden_RH.unsqueeze(0)
        logits: torch.Tensor = self._theirs(input_ids=_no_tokens(hidden_RH), use_cache=False).logits[0]
        return logits.contiguous()


class _GivenHidden(torch.nn.Module):
    """Stands where the model's body was, and answers with hidden states that are known already."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None

    def forward(self, *_: object, **__: object) -> _Answer:
        return _Answer(self.hidden)

    @property
    def decoder(self) -> _GivenHidden:
        """Where OPT and its like look for the body within the body."""
        return self


class _Answer:
    """What a body returns: hidden states, and None for all else that some models ask for."""

    def __init__(self, hidden: torch.Tensor | None) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor | None:
        assert index == 0, f"a body answers with hidden states, not with a {index}th thing"
        return self.last_hidden_state


class _OpLinear(torch.nn.Module):
    """A linear of the library through the op table."""

    def __init__(self, weight_MK: torch.Tensor, bias_M: torch.Tensor | None, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self._prepared = ops.prepare_linear(weight_MK.detach(), None if bias_M is None else bias_M.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self._ops.linear(rows, self._prepared).view(*x.shape[:-1], -1)


class _WithOpLinears(torch.nn.Module):
    """A module with matrices of its own, a router or experts, whose calls of torch's linear go through the op table."""

    def __init__(self, module: torch.nn.Module, ops: Ops) -> None:
        super().__init__()
        self._module, self._mode = module, _LinearsByOps(module, ops)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        with self._mode:
            return self._module(*arguments, **named)


class _LinearsByOps(torch.overrides.TorchFunctionMode):
    """Weights, or the slices of them that are one expert's, are prepared when they are first used."""

    def __init__(self, module: torch.nn.Module, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._prepared: dict[int, Any] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not torch.nn.functional.linear:
            return function(*args, **(kwargs or {}))
        return self._linear(*args, **(kwargs or {}))

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:  # Named as in torch, for calls by name.
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        return self._ops.linear(rows, self._prepare(weight, bias)).view(*input.shape[:-1], -1)

    def _prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        # A whole parameter is a router's, where a small error would choose another expert; experts are slices.
        is_exact = isinstance(weight, torch.nn.Parameter)
        if weight.untyped_storage().data_ptr() not in self._storages:
            return self._ops.prepare_linear(weight, bias, exact=True)
        if weight.data_ptr() not in self._prepared:
            self._prepared[weight.data_ptr()] = self._ops.prepare_linear(weight.detach(), bias, exact=is_exact)
        return self._prepared[weight.data_ptr()]


class _InLanes(torch.nn.Module):
    """An activation, on a whole number of vector registers in every thread's share.

    Torch has other code for what is left over, whose last bits differ; where that begins would depend on the batch.
    """

    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self._activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = _LANES * math.lcm(*range(1, torch.get_num_threads() + 1))
        if x.numel() % unit == 0 and x.is_contiguous():
            whole: torch.Tensor = self._activation(x)
            return whole
        flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % unit))
        out: torch.Tensor = self._activation(flat)[: x.numel()].view(x.shape)
        return out


def load(path: Path, ops: Ops, *, device: torch.device, dtype: torch.dtype, is_dummy: bool) -> TransformersModel:
    """
    Raises:
        ModelUnavailable: the library cannot load it, or its attention cannot be replaced.
        ConfigError: the library is not installed.
    """
    transformers = library()
    transformers.AttentionInterface.register(transformers_attention.NAME, transformers_attention.attend)
    options = {
        "dtype": dtype,
        "attn_implementation": transformers_attention.NAME,
        "experts_implementation": "eager",  # Its other ways multiply the tokens of all experts at once.
    }
    model_class = transformers.AutoModelForCausalLM
    theirs_config = read_theirs(path)
    named = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(theirs_config)]
    if not getattr(named, "_supports_attention_backend", False):
        raise ModelUnavailable(f"{path}: {named.__name__} does not let its attention be replaced")
    try:
        if is_dummy:
            with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False):
                torch.manual_seed(DUMMY_SEED)
                theirs = model_class.from_config(theirs_config, **options)
        else:
            theirs = model_class.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except (ValueError, OSError, KeyError) as error:
        raise ModelUnavailable(f"{path}: the transformers library cannot load it: {error}") from error
    return TransformersModel(theirs.eval().requires_grad_(False).to(device), ops)


def _replace_modules(root: torch.nn.Module, ops: Ops) -> None:
    """Whatever multiplies by a matrix, or is an activation, is made row-invariant."""
    module: Any
    for parent, name, module in list(_children(root)):
        parameters = list(module.parameters(recurse=False))
        if type(module) is torch.nn.Linear:
            setattr(parent, name, _OpLinear(module.weight, module.bias, ops))
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear, whose weight lies the other way round.
            setattr(parent, name, _OpLinear(module.weight.t().contiguous(), module.bias, ops))
        elif type(module).__module__ in _ACTIVATIONS and not parameters:
            setattr(parent, name, _InLanes(module))
        elif not isinstance(module, torch.nn.Embedding) and any(parameter.dim() > 1 for parameter in parameters):
            setattr(parent, name, _WithOpLinears(module, ops))


def _children(root: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    for parent in root.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _no_tokens(hidden_RH: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, len(hidden_RH), dtype=torch.int64, device=hidden_RH.device)
