"""What the shipped model makes of token ids, in float64 and without the server: its interpreter runs this.

Reads a JSON list of token id lists; writes, for each, the log-probability of every token but the first, and whether
it is the likeliest.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.engine.oracle import oracle_logits

CLASSICS = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"


def main() -> None:
    config = json.loads((CLASSICS / "config.json").read_text())
    tensors = load_file(CLASSICS / "model.safetensors")
    answers = []
    for token_ids in json.load(sys.stdin):
        logprobs = torch.log_softmax(oracle_logits(config, tensors, token_ids)[:-1], dim=-1)
        own = logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
        answers.append({"logprobs": own.tolist(), "greedy": (own == logprobs.amax(1)).tolist()})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
