"""What the server does under load: many clients against one, and memory over many short requests half cancelled.

    python benchmarks/serve_load.py MODEL [--clients 64] [--tokens 64] [--requests 2000]

Starts `dovetail serve MODEL` on loopback, asks it, and stops it. Every streamed answer is checked: it must come to its
end and hold as many tokens as its usage counts; anything else ends the script with an error. Prints one JSON line:

    tokens_per_second_one, tokens_per_second_all, ratio     of one client alone, and of all together
    requests, cancelled                                     short ones, and how many of them their clients left early
    mb_after_quarter, mb_after_all, growth                  resident memory of the server
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import httpx
import psutil

_EARLIEST_END = 4
"""Events of the shortest answers: who speaks, some tokens, the end."""
SCRIPT = "import sys; from dovetail.cli.main import main; main(sys.argv[1:])"


def start(model: str, max_running: int) -> tuple[subprocess.Popen[str], str]:
    """The server, and its address."""
    flags = ["--port", "0", "--max-running", str(max_running), "--max-waiting", "4096"]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "serve", f"model={model}", *flags], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on " in line:
            return process, line.split("listening on ")[1].split()[0]
    raise SystemExit("the server did not start")


async def answer(
    client: httpx.AsyncClient, number: int, num_tokens: int, leave_after: int | None
) -> int | None:
    """Stream one answer to its end, and return the tokens the server counted; or leave after some events: None."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": f"Tell me about the number {number}."}],
        "max_tokens": num_tokens,
        "seed": number,
        "temperature": 1.0,
        "stream": True,
        "logprobs": True,
        "stream_options": {"include_usage": True},
    }
    num_seen, num_events, counted, reason = 0, 0, 0, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(event["error"]["message"])
            num_events += 1
            if leave_after is not None and num_events > leave_after:
                return None
            for choice in event["choices"]:
                num_seen += len((choice.get("logprobs") or {}).get("content", ()))
                reason = choice["finish_reason"] or reason
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    # The token that ends an answer is counted and has no text.
    assert reason in ("stop", "length"), reason
    assert counted - num_seen in ((0, 1) if reason == "stop" else (0,)), (counted, num_seen, reason)
    return counted


async def rate(url: str, num_clients: int, num_tokens: int, seeds: Sequence[int]) -> float:
    """Tokens a second that the clients get together; each asks one question after the other."""
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        shares = [seeds[start::num_clients] for start in range(num_clients)]
        totals = await asyncio.gather(*(_one_by_one(client, share, num_tokens) for share in shares))
        return sum(totals) / (time.perf_counter() - began)


async def _one_by_one(client: httpx.AsyncClient, seeds: Sequence[int], num_tokens: int) -> int:
    return sum([await answer(client, seed, num_tokens, None) or 0 for seed in seeds])


async def memory(url: str, process: psutil.Process, num_requests: int) -> tuple[int, int, int]:
    """Resident bytes after a quarter of many short requests and after all, and how many of them were cancelled.

    Every other one leaves at a random point: before the first token at the earliest, and before the last of the
    shortest answers at the latest.
    """
    rng = random.Random(0)
    places = asyncio.Semaphore(16)
    cancelled = 0

    async def one(client: httpx.AsyncClient, number: int) -> None:
        nonlocal cancelled
        leave_after = rng.randrange(_EARLIEST_END) if number % 2 else None
        async with places:
            tokens = await answer(client, number, 16, leave_after)
        cancelled += tokens is None

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        first = num_requests // 4
        await asyncio.gather(*(one(client, number) for number in range(first)))
        early = process.memory_info().rss
        await asyncio.gather(*(one(client, number) for number in range(first, num_requests)))
    return early, process.memory_info().rss, cancelled


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64, help="0 leaves the rates out")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000, help="0 leaves the memory out")
    given = parser.parse_args()
    process, url = start(given.model, max(given.clients, 16))
    found: dict[str, object] = {"model": given.model}
    try:
        if given.clients:
            asyncio.run(rate(url, 1, 8, [0]))
            one = asyncio.run(rate(url, 1, given.tokens, range(1000, 1003)))
            many = asyncio.run(rate(url, given.clients, given.tokens, range(given.clients)))
            found |= {"clients": given.clients, "tokens_per_second_one": round(one, 1)}
            found |= {"tokens_per_second_all": round(many, 1), "ratio": round(many / one, 2)}
        if given.requests:
            early, late, left = asyncio.run(memory(url, psutil.Process(process.pid), given.requests))
            found |= {
                "requests": given.requests,
                "cancelled": left,
                "mb_after_quarter": early >> 20,
                "mb_after_all": late >> 20,
            }
            found["growth"] = round(late / early - 1, 4)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
