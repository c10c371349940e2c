"""What the type of the states costs a trained model: the engine's own decode kernels, on a GPU.

    python -m tests.bench.precision --text FOLDER [--tokens 2048] [--json FILE]

Sequences from the texts are decoded token by token, all side by side, once with float32 states that absorb every token
in place, and once with each type and its ring; float32 states once more split, as a bfloat16 model's are held, so that
what is read of them is rounded. Weights and activations are float32, so that only the states differ. Per position: the
change of the next token's negative log-likelihood, KL(exact || this), and whether the most likely token changes. The
same for one token repeated.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from server.engine.batch import ModelInputs
from server.engine.checkpoint import load_model
from server.engine.config import GLAConfig
from server.engine.model import GLAModel
from server.engine.state_pool import StateTensors, allocate_states
from server.kernels import SPLIT, STATE_DTYPES, LayerState, RingRows, held_shape
from server.tokenizer import load_tokenizer

DEFAULT_MODEL = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"
EXACT = "float32, in place"
SPLIT_NAME = "float32, split"


@dataclass(slots=True)
class Variant:
    """One way to hold the states of B sequences."""

    name: str
    states: StateTensors
    in_place: bool
    pending: int = 0

    def step(self, model: GLAModel, tokens_B: Tensor, position: int) -> Tensor:
        """Absorb one token of every sequence; log-probabilities of the next [B, vocab_size]."""
        count, device = len(tokens_B), tokens_B.device
        size = self.states.ring_size
        # The first token starts from zero, and such a row folds.
        folds = self.in_place or position == 0 or (position + 1) % size == 0
        rows = torch.arange(count, device=device)
        num_folding = torch.tensor([count if folds else 0], device=device)
        inputs = ModelInputs(
            token_ids_T=tokens_B,
            num_decodes=count,
            slots_N=rows + 1,
            from_zero_N=torch.full((count,), position == 0, device=device),
            cu_seqlens=torch.zeros(1, dtype=torch.int32, device=device),
            longest_prefill=0,
            output_rows_R=rows,
            ring_rows=RingRows(torch.full_like(rows, self.pending), None if self.in_place else num_folding),
        )
        self.pending = 0 if folds else self.pending + 1
        return model.forward(inputs, self.states).log_softmax(-1)


def _allocate(model: GLAModel, count: int, dtype: str, *, split: bool) -> StateTensors:
    device = model.norm.device
    states = allocate_states(model.config, count, device=device, dtype=model.dtype, state_dtype=STATE_DTYPES[dtype])
    if not split:
        return states
    layers, slots, kv_heads, head_k, head_v = states.parts["recurrent"].shape
    held = torch.zeros((layers, slots, *held_shape(kv_heads, head_k, head_v, SPLIT)), dtype=SPLIT, device=device)
    return StateTensors(
        {**states.parts, "recurrent": held},
        tuple(LayerState.of(held_S, None, layer.ring) for held_S, layer in zip(held, states.layers, strict=True)),
    )


@torch.inference_mode()
def compare(model: GLAModel, tokens_BT: Tensor) -> dict[str, dict[str, float]]:
    """Figures by type of state: Δnll and KL in nats, flips and non-finite positions as shares."""
    count, steps = tokens_BT.shape
    exact, *others = (
        Variant(name, _allocate(model, count, dtype, split=name == SPLIT_NAME), in_place=name == EXACT)
        for name, dtype in (
            (EXACT, "float32"),
            *((dtype, dtype) for dtype in STATE_DTYPES),
            (SPLIT_NAME, "float32"),
        )
    )
    sums = {other.name: torch.zeros(4, dtype=torch.float64, device=tokens_BT.device) for other in others}
    squares = {other.name: torch.zeros(count, dtype=torch.float64, device=tokens_BT.device) for other in others}
    for t in range(steps - 1):
        truth = exact.step(model, tokens_BT[:, t], t)
        target = tokens_BT[:, t + 1, None]
        for other in others:
            mine = other.step(model, tokens_BT[:, t], t)
            change = (truth.gather(1, target) - mine.gather(1, target)).squeeze(1).double()
            kl = (truth.exp() * (truth - mine)).sum(1).double()
            flips = truth.argmax(1) != mine.argmax(1)
            wrong = ~mine.isfinite().all(1)
            sums[other.name] += torch.stack([x.double().sum() for x in (change, kl, flips, wrong)])
            squares[other.name] += change
    positions = count * (steps - 1)
    result = {}
    for name, total in sums.items():
        nll, kl, flips, wrong = (total / positions).tolist()
        # Of the mean over sequences.
        error = float((squares[name] / (steps - 1)).std() / count**0.5) if count > 1 else 0.0
        result[name] = {"nll": nll, "nll error": error, "kl": kl, "flips": flips, "not finite": wrong}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--per-text", type=int, default=8, help="sequences of each text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    config = GLAConfig.from_folder(args.model)
    model = load_model(args.model, config, device=torch.device("cuda"), dtype=torch.float32)
    tokenizer = load_tokenizer(args.model)
    sequences = []
    for path in sorted(args.text.glob("*.txt")):
        ids = tokenizer.encode(path.read_text(), add_special_tokens=False)
        assert len(ids) >= args.per_text * args.tokens, f"{path} is too short"
        stride = len(ids) // args.per_text
        sequences += [ids[i * stride : i * stride + args.tokens] for i in range(args.per_text)]
    texts = torch.tensor(sequences, device="cuda")
    repeated = texts[:: args.per_text, :1].expand(-1, args.tokens)
    report = {}
    for title, tokens in ((f"{len(texts)} sequences of {args.tokens} tokens", texts), ("one token repeated", repeated)):
        report[title] = compare(model, tokens)
        print(f"{title}: against float32 states updated in place with every token")
        print(f"{'states':>14} {'d nll 1e-3':>11} {'+-':>7} {'KL':>9} {'flips %':>8} {'not finite %':>13}")
        for name, row in report[title].items():
            print(
                f"{name:>14} {row['nll'] * 1e3:11.3f} {row['nll error'] * 1e3:7.3f} {row['kl']:9.1e} "
                f"{row['flips'] * 100:8.3f} {row['not finite'] * 100:13.3f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
