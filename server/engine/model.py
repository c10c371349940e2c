"""The GLA language model, for inference over a step's packed tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.batch import ModelInputs
from server.engine.config import GLAConfig
from server.engine.layers import FEATURE_MAP_FUNCTIONS, ConvIndex, Projection, short_conv
from server.engine.state_pool import StateTensors
from server.kernels import (
    LayerState,
    LowRankGate,
    gla_decode,
    gla_prefill,
    linear_add_,
    norm_gate,
    norm_linear,
    norm_swiglu,
)

_GATE_RANK = 16
_GATE_NORMALIZER = 16


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states after the last layer, before the norm.

    Attributes:
        x_TD: [T, hidden_size].
        addends_STD: what is still to be added to them, float32 [S, T, hidden_size], or None.
        rows_R: int64 [R], which of the T are the rows whose logits the step wants, in their order; None: these rows
            are all there is.
    """

    x_TD: Tensor
    addends_STD: Tensor | None = None
    rows_R: Tensor | None = None


class GLAModel:
    """A ``gla`` checkpoint's network, without gradients.

    Weights are uninitialised until :func:`server.engine.checkpoint.load_model` has filled them. Projections of one
    input are one matrix; :meth:`checkpoint_tensors` says which part of it each tensor of a checkpoint is.

    Args:
        config: the architecture.
        device: where the weights lie; ``meta`` reserves nothing.
        dtype: of weights and activations: float32, bfloat16 or float16. Gates, norms' statistics, convolution sums
            and logits are float32.
    """

    def __init__(self, config: GLAConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        device = torch.device(device)
        self.layers = [GLALayer(config, device, dtype) for _ in range(config.num_hidden_layers)]
        self.norm = _weight(config.hidden_size, device=device, dtype=dtype)
        self.lm_head = Projection(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        if config.tie_word_embeddings:
            self.embeddings = self.lm_head.weight
        else:
            self.embeddings = _weight(config.vocab_size, config.hidden_size, device=device, dtype=dtype)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes: its name there -> a view of this model's weights, of its shape.

        Biases of short convolutions are included; a checkpoint may be without them.
        """
        tensors: dict[str, Tensor] = {"model.embeddings.weight": self.embeddings, "model.norm.weight": self.norm}
        for i, layer in enumerate(self.layers):
            tensors |= {f"model.layers.{i}.{name}": view for name, view in layer.checkpoint_tensors().items()}
        if not self.config.tie_word_embeddings:
            tensors["lm_head.weight"] = self.lm_head.weight
        return tensors

    def pack(self) -> None:
        """Give projections the form that is multiplied fastest on this device, once their weights are final.

        Afterwards :meth:`checkpoint_tensors` must not be asked for.
        """
        self.lm_head.pack()
        for layer in self.layers:
            for projection in (layer.in_proj, layer.out_proj, layer.gate_up_proj, layer.down_proj):
                projection.pack()

    @torch.inference_mode()
    def forward(self, inputs: ModelInputs, state: StateTensors, *, out_RV: Tensor | None = None) -> Tensor:
        """Absorb a step's tokens into the states, and return logits of the wanted rows.

        Args:
            inputs: the step's tokens and spans, on the model's device.
            state: the pool; the slots that the inputs name are updated in place, in every layer.
            out_RV: where to write the logits, float32 [R, vocab_size]; None: a new tensor.

        Returns:
            The logits.
        """
        hidden = self.absorb(inputs, state)
        return self.logits(hidden, hidden.rows_R, out_RV=out_RV)

    @torch.inference_mode()
    def absorb(
        self,
        inputs: ModelInputs,
        state: StateTensors,
        *,
        all_rows: bool = False,
        before_layer: Callable[[int], None] | None = None,
    ) -> Hidden:
        """The first part of :meth:`forward`: the hidden states.

        Args:
            before_layer: called with the number of each layer before its kernels are launched.
            all_rows: whether those of every row are wanted. Else, behind the last layer's states, a step with prompts
                goes on with the rows whose logits it wants: of a long prompt, one.
        """
        conv_index = None
        if self.config.use_short_conv:
            conv_index = ConvIndex.build(
                self.config.conv_size,
                inputs.token_ids_T.shape[0],
                inputs.num_decodes,
                inputs.cu_seqlens,
                inputs.slots_N,
                inputs.from_zero_N,
            )
        x_TD = F.embedding(inputs.token_ids_T, self.embeddings)
        conv_states = [None] * len(self.layers) if state.conv_LSWD is None else state.conv_LSWD.unbind()
        addends: Tensor | None = None
        wanted_R = inputs.output_rows_R if inputs.longest_prefill and not all_rows else None
        for i, (layer, layer_state, conv_SWD) in enumerate(zip(self.layers, state.layers, conv_states, strict=True)):
            if before_layer is not None:
                before_layer(i)
            rows_R = wanted_R if layer is self.layers[-1] else None
            x_TD, addends = layer.forward(x_TD, addends, inputs, layer_state, conv_SWD, conv_index, rows_R)
        return Hidden(x_TD, addends, inputs.output_rows_R if wanted_R is None else None)

    @torch.inference_mode()
    def logits(self, hidden: Hidden, rows_R: Tensor | None, *, out_RV: Tensor | None = None) -> Tensor:
        """The second part of :meth:`forward`: logits of some of the hidden states' rows, float32 [R, vocab_size].

        Args:
            hidden: what :meth:`absorb` returned.
            rows_R: int64 [R]; None: all of them.
            out_RV: where to write the logits; None: a new tensor.
        """
        num_hidden = hidden.x_TD.shape[0]
        count = num_hidden if rows_R is None else rows_R.shape[0]
        if out_RV is None:
            out_RV = hidden.x_TD.new_empty((count, self.config.vocab_size), dtype=torch.float32)
        # A single row needs no selection, and is spared the launch.
        single = num_hidden == count == 1
        return norm_linear(
            *(hidden.x_TD, self.norm, self.lm_head.matrix),
            eps=self.config.norm_eps,
            addends_STD=hidden.addends_STD,
            rows_R=None if single else rows_R,
            out_RN=out_RV,
        )


class GLALayer:
    """One layer: gated linear attention and a gated MLP, each behind an RMSNorm and added to its input."""

    def __init__(self, config: GLAConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        width, inner = config.hidden_size, config.intermediate_size
        self.qkv_sizes = (config.key_dim, config.kv_key_dim, config.kv_value_dim)
        gate_size = config.value_dim if config.use_output_gate else 0
        self.in_sizes = (sum(self.qkv_sizes), _GATE_RANK, gate_size)
        self.feature_map = FEATURE_MAP_FUNCTIONS[config.feature_map] if config.feature_map else None
        self.scale = config.head_k**-0.5

        self.attn_norm = _weight(width, device=device, dtype=dtype)
        self.in_proj = Projection(
            sum(self.in_sizes), width, device=device, dtype=dtype
        )  # q, k, v, low-rank, output gate
        # Gates are exponents, summed over many tokens: their last projection is computed in float32.
        self.decay_proj = _weight(config.kv_key_dim, _GATE_RANK, device=device, dtype=torch.float32)
        self.decay_bias = _weight(config.kv_key_dim, device=device, dtype=torch.float32)
        self.head_norm = _weight(config.head_v, device=device, dtype=dtype) if config.elementwise_affine else None
        self.out_proj = Projection(width, config.value_dim, device=device, dtype=dtype)
        if config.use_short_conv:
            self.conv_weight = _weight(config.conv_size, self.in_sizes[0], device=device, dtype=torch.float32)
            self.conv_bias = _weight(self.in_sizes[0], device=device, dtype=torch.float32)
        self.mlp_norm = _weight(width, device=device, dtype=dtype)
        self.gate_up_proj = Projection(2 * inner, width, device=device, dtype=dtype)
        self.down_proj = Projection(width, inner, device=device, dtype=dtype)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """As :meth:`GLAModel.checkpoint_tensors`, with names inside the layer."""
        config = self.config
        qkv, low_rank, gate = self.in_proj.weight.split(self.in_sizes)
        q, k, v = qkv.split(self.qkv_sizes)
        mlp_gate, mlp_up = self.gate_up_proj.weight.chunk(2)
        tensors = {
            "attn_norm.weight": self.attn_norm,
            "attn.q_proj.weight": q,
            "attn.k_proj.weight": k,
            "attn.v_proj.weight": v,
            "attn.gk_proj.0.weight": low_rank,
            "attn.gk_proj.1.weight": self.decay_proj,
            "attn.gk_proj.1.bias": self.decay_bias,
            "attn.o_proj.weight": self.out_proj.weight,
            "mlp_norm.weight": self.mlp_norm,
            "mlp.gate_proj.weight": mlp_gate,
            "mlp.up_proj.weight": mlp_up,
            "mlp.down_proj.weight": self.down_proj.weight,
        }
        if config.use_output_gate:
            tensors["attn.g_proj.weight"] = gate
        if self.head_norm is not None:
            fused = config.fuse_norm and config.use_output_gate
            tensors[f"attn.{'g_norm_swish_gate' if fused else 'g_norm'}.weight"] = self.head_norm
        if config.use_short_conv:
            weights = self.conv_weight.t().unsqueeze(1).split(self.qkv_sizes)  # each [channels, 1, conv_size]
            for name, weight, bias in zip("qkv", weights, self.conv_bias.split(self.qkv_sizes), strict=True):
                tensors |= {f"attn.{name}_conv1d.weight": weight, f"attn.{name}_conv1d.bias": bias}
        return tensors

    def forward(
        self,
        x_TD: Tensor,
        addends: Tensor | None,
        inputs: ModelInputs,
        state: LayerState,
        conv_SWD: Tensor | None,
        conv_index: ConvIndex | None,
        rows_R: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Add the layer's outputs to ``x_TD`` [T, hidden_size], in place, and update the layer's states.

        Args:
            addends: what the layer before has left to be added to ``x_TD``.
            rows_R: int64 [R], the rows whose outputs are wanted; None: all, in place.

        Returns:
            The rows with this layer's outputs, and what is left to be added to them.
        """
        eps = self.config.norm_eps
        projected = norm_linear(x_TD, self.attn_norm, self.in_proj.matrix, eps=eps, addends_STD=addends)
        qkv, low_rank, gate = projected.split(self.in_sizes, dim=1)
        if conv_index is not None and conv_SWD is not None:
            qkv = short_conv(qkv, self.conv_weight, self.conv_bias, conv_SWD, conv_index)
        decays = LowRankGate(low_rank, self.decay_proj, self.decay_bias, _GATE_NORMALIZER, self.config.clamp_min)
        o_THV = self._attend(qkv, decays, inputs, state)
        if rows_R is not None:
            # What the layer before left has been added by the first norm.
            x_TD, o_THV, gate = (rows.index_select(0, rows_R) for rows in (x_TD, o_THV, gate))
        o_TE = norm_gate(o_THV, self.head_norm, gate if self.config.use_output_gate else None, eps=eps)
        addends = linear_add_(x_TD, o_TE, self.out_proj.matrix)
        h_TI = norm_swiglu(x_TD, self.mlp_norm, self.gate_up_proj.matrix, eps=eps, addends_STD=addends)
        return x_TD, linear_add_(x_TD, h_TI, self.down_proj.matrix)

    def _attend(self, qkv: Tensor, decays: LowRankGate, inputs: ModelInputs, state: LayerState) -> Tensor:
        """The recurrence over a step's spans: what each token reads, [T, heads, head_v]."""
        q, k, v = qkv.split(self.qkv_sizes, dim=1)
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        q_THK = q.view(-1, self.config.num_heads, self.config.head_k)
        k_TGK = k.view(-1, self.config.num_kv_heads, self.config.head_k)
        v_TGV = v.view(-1, self.config.num_kv_heads, self.config.head_v)
        d = inputs.num_decodes
        slots, from_zero = inputs.slots_N, inputs.from_zero_N
        if not inputs.longest_prefill:
            return gla_decode(
                *(q_THK, k_TGK, v_TGV, decays, state, slots, from_zero), scale=self.scale, rows=inputs.ring_rows
            )
        o_prefill = gla_prefill(
            *(q_THK[d:], k_TGK[d:], v_TGV[d:], decays[d:], state, slots[d:], from_zero[d:], inputs.cu_seqlens),
            scale=self.scale,
            max_length=inputs.longest_prefill,
        )
        if not d:
            return o_prefill
        o_decode = gla_decode(
            *(q_THK[:d], k_TGK[:d], v_TGV[:d], decays[:d], state, slots[:d], from_zero[:d]),
            scale=self.scale,
            rows=inputs.ring_rows,
        )
        return torch.cat((o_decode, o_prefill))


def _weight(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An uninitialised weight."""
    return torch.empty(shape, device=device, dtype=dtype)
