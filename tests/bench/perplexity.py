"""Perplexity of a checkpoint on text files, in windows that each begin with the BOS token.

    python -m tests.bench.perplexity --text FOLDER [--model FOLDER] [--device cuda] [--dtype bfloat16] [--json FILE]

Only full windows count. Every window is one prompt span through the engine's own model and kernels.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from server.engine.batch import ModelInputs
from server.engine.checkpoint import load_model
from server.engine.config import GLAConfig
from server.engine.state_pool import allocate_states
from server.tokenizer import load_tokenizer

DEFAULT_MODEL = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"


@torch.inference_mode()
def window_nll(
    folder: Path, texts: list[Path], *, device: torch.device, dtype: torch.dtype, window: int, batch: int
) -> dict[str, tuple[float, int]]:
    """Mean negative log-likelihood per token (nats) and the number of windows, by file name."""
    config = GLAConfig.from_folder(folder)
    model = load_model(folder, config, device=device, dtype=dtype)
    model.pack()
    states = allocate_states(config, batch, device=device, dtype=dtype, state_dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    bos = tokenizer.bos_token_id
    assert bos is not None, "the windows begin with the BOS token; this tokenizer has none"
    results = {}
    for path in texts:
        ids = tokenizer.encode(path.read_text(), add_special_tokens=False)
        body = window - 1
        windows = torch.tensor(ids[: len(ids) // body * body]).view(-1, body)
        windows = torch.cat((torch.full((len(windows), 1), bos), windows), 1)
        total = 0.0
        for rows in windows.split(batch):
            count = len(rows)
            tokens = rows.flatten().to(device)
            logits = model.forward(
                ModelInputs(
                    token_ids_T=tokens,
                    num_decodes=0,
                    slots_N=torch.arange(1, count + 1, device=device),
                    from_zero_N=torch.ones(count, dtype=torch.bool, device=device),
                    cu_seqlens=torch.arange(0, count * window + 1, window, dtype=torch.int32, device=device),
                    longest_prefill=window,
                    output_rows_R=torch.arange(count * window, device=device),
                ),
                states,
            ).view(count, window, -1)
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), tokens.view(count, window)[:, 1:].flatten(), reduction="sum"
                )
            )
        results[path.stem] = (total / (len(windows) * body), len(windows))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    results = window_nll(
        args.model,
        sorted(args.text.glob("*.txt")),
        device=torch.device(args.device),
        dtype=getattr(torch, args.dtype),
        window=args.window,
        batch=args.batch,
    )
    print(f"{'text':44} {'windows':>8} {'nll/token':>10} {'perplexity':>11}")
    for name, (nll, count) in results.items():
        print(f"{name:44} {count:8d} {nll:10.4f} {math.exp(nll):11.3f}")
    print(f"{args.device}, {args.dtype} weights, windows of {args.window}, {time.monotonic() - start:.1f} s")
    if args.json:
        args.json.write_text(
            json.dumps({name: {"nll": nll, "windows": count} for name, (nll, count) in results.items()})
        )


if __name__ == "__main__":
    main()
