"""Throughput of a running server over HTTP: concurrent token streams, read as a client reads them.

    python -m tests.bench.http --base-url http://127.0.0.1:8000 [--streams 1,16] [--tokens 256] [--json FILE]

The client is a bare socket reader, so that it takes as little as possible of the cores it shares with
the server. Every stream must end with [DONE] and have all its tokens.
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit


async def stream(host: str, port: int, body: dict[str, object]) -> tuple[float, float, int]:
    """One request: seconds to the first chunk, seconds in all, tokens as the usage says."""
    payload = json.dumps(body).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    first = 0.0
    tail = b""
    while data := await reader.read(1 << 16):
        if not first and b"data: " in data:
            first = time.perf_counter() - start
        tail = (tail + data)[-2000:]
    writer.close()
    total = time.perf_counter() - start
    if b"data: [DONE]" not in tail:
        raise SystemExit(f"a stream was cut off: {tail!r}")
    usage = json.loads(tail[tail.index(b'"usage":{') + 8 :].split(b"}", 1)[0] + b"}")
    return first, total, usage["completion_tokens"]


async def measure(host: str, port: int, streams: int, body: dict[str, object]) -> dict[str, float]:
    """All streams at once."""
    start = time.perf_counter()
    results = await asyncio.gather(*(stream(host, port, body) for _ in range(streams)))
    seconds = time.perf_counter() - start
    return {
        "streams": streams,
        "tokens_per_s": sum(tokens for _, _, tokens in results) / seconds,
        "ttft_ms_median": statistics.median(first for first, _, _ in results) * 1e3,
        "tpot_ms_median": statistics.median((total - first) / (tokens - 1) for first, total, tokens in results) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="classics-11m")
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", default="The old man looked at the sea and")
    parser.add_argument("--prompt-ids", type=int, help="instead: so many token ids, for a server without a tokenizer")
    parser.add_argument("--temperature", type=float, help="default: the server's")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    url = urlsplit(args.base_url)
    body: dict[str, object] = {
        "model": args.model,
        "prompt": args.prompt if args.prompt_ids is None else [5 + i % 200 for i in range(args.prompt_ids)],
        "max_tokens": args.tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.temperature is not None:
        body["temperature"] = args.temperature
    host, port = url.hostname or "127.0.0.1", url.port or 80
    asyncio.run(measure(host, port, 2, body | {"max_tokens": 16}))
    rows = [asyncio.run(measure(host, port, int(streams), body)) for streams in args.streams.split(",")]
    print(f"{'streams':>8} {'tokens/s':>10} {'TTFT ms':>9} {'TPOT ms':>9}")
    for row in rows:
        print(
            f"{row['streams']:8.0f} {row['tokens_per_s']:10,.0f} "
            f"{row['ttft_ms_median']:9.2f} {row['tpot_ms_median']:9.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
