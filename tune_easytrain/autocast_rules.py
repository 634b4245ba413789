"""CUDA's autocast rules, so that they can be followed where there is no CUDA.

Source: ATen/autocast_mode.h of PyTorch, which lists the operations of each rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER_PRECISION = _names(
    """
    _convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv
    linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell
    _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention
    scaled_dot_product_attention
    """
)
"""Run in the lower precision: all floating arguments are cast to it."""

FULL_PRECISION = _names(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm
    frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss
    mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
    multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
    _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa norm.Scalar norm.ScalarOpt_dim
    """
)
"""Run in fp32: all floating arguments are cast to it."""

FULL_PRECISION_RESULT = _names(
    """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
    """
)
"""Give their result in fp32, unless the caller names a dtype."""

WIDEST = _names(
    """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
    """
)
"""Run in the widest of their arguments' types."""


class Autocast:
    """The state of autocast on a device whose tensors are `meta` tensors.

    `dtype` is None where autocast is off.
    """

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    def apply(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return an operation's arguments as its rule wants them."""
        if self.dtype is None:
            return args, kwargs
        if name in LOWER_PRECISION:
            return self._cast((args, kwargs), self.dtype)
        if name in FULL_PRECISION:
            return self._cast((args, kwargs), torch.float32)
        if name in FULL_PRECISION_RESULT and _is_castable(args[0]):
            return _with_result_dtype(name, args, kwargs)
        if name in WIDEST:
            floating = [t.dtype for t in tree_iter((args, kwargs)) if _is_castable(t)]
            is_wide = torch.float32 in floating
            return self._cast((args, kwargs), torch.float32 if is_wide else self.dtype)
        return args, kwargs

    def _cast(self, arguments: tuple[Any, Any], dtype: torch.dtype) -> tuple[Any, Any]:
        args, kwargs = tree_map(lambda value: self._cast_tensor(value, dtype), arguments)
        return args, kwargs

    def _cast_tensor(self, value: Any, dtype: torch.dtype) -> Any:
        if not _is_castable(value) or value.dtype == dtype:
            return value
        is_weight = value.requires_grad and value.is_leaf and value.dtype == torch.float32
        if not is_weight or dtype == torch.float32:
            return value.to(dtype)
        if id(value) not in self._casts:  # as on CUDA: each weight is cast once per forward pass
            self._casts[id(value)] = (value, value.to(dtype))
        return self._casts[id(value)][1]

    @contextmanager
    def enabled(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Switch autocast on (None: off) inside the block; casts of weights end with the outermost."""
        outer, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = outer
            if outer is None:
                self._casts.clear()

    @contextmanager
    def stands_in_for_torch(self) -> Iterator[None]:
        """Let `torch.autocast` for `meta` and `cuda` mean this one, for models that switch it themselves."""
        original: Any = torch.amp.autocast_mode.autocast
        rules = self
        ours = ("meta", "cuda")
        is_available, is_enabled = torch.amp.is_autocast_available, torch.is_autocast_enabled
        get_dtype = torch.get_autocast_dtype
        init, enter, leave = original.__init__, original.__enter__, original.__exit__
        entered: dict[int, list[Any]] = {}

        def new_init(
            self: Any,
            device_type: str,
            dtype: torch.dtype | None = None,
            enabled: bool = True,
            cache_enabled: bool | None = None,
        ) -> None:
            self.stand_in = device_type in ours
            if self.stand_in:
                chosen = dtype or rules.dtype or torch.float16
                self.emulated_dtype = None if not enabled or chosen == torch.float32 else chosen
                init(self, "cpu", enabled=False)
            else:
                init(self, device_type, dtype, enabled, cache_enabled)

        def new_enter(self: Any) -> Any:
            if not self.stand_in:
                return enter(self)
            block = rules.enabled(self.emulated_dtype)
            block.__enter__()
            entered.setdefault(id(self), []).append(block)
            return self

        def new_exit(self: Any, *error: Any) -> Any:
            if not self.stand_in:
                return leave(self, *error)
            entered[id(self)].pop().__exit__(None, None, None)
            return None

        with (
            mock.patch.object(original, "__init__", new_init),
            mock.patch.object(original, "__enter__", new_enter),
            mock.patch.object(original, "__exit__", new_exit),
            mock.patch.object(torch.amp, "is_autocast_available", lambda d: d in ours or is_available(d)),
            mock.patch.object(
                torch,
                "is_autocast_enabled",
                lambda d="cuda": rules.dtype is not None if d in ours else is_enabled(d),
            ),
            mock.patch.object(
                torch,
                "get_autocast_dtype",
                lambda d: (rules.dtype or torch.float16) if d in ours else get_dtype(d),
            ),
        ):
            yield


def _is_castable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "meta"
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _with_result_dtype(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    schema = overload(name)._schema
    positions = [argument.name for argument in schema.arguments]
    index = positions.index("dtype")
    given = args[index] if index < len(args) else kwargs.get("dtype")
    if given is not None:
        return args, kwargs
    return args[:index], {**kwargs, "dtype": torch.float32}


def overload(name: str) -> Any:
    """Return ATen's operation of this name, such as `softmax.int`."""
    base, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), variant or "default")
