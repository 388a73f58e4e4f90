"""A server under load, from a second process on loopback.

python benchmarks/load.py MODEL [--seconds 300] [--streams 32] [--abuse] [--out FILE]

Starts `respike serve MODEL`, keeps so many streams of mixed length running, and tells what was
lost, the longest gap between two tokens, and memory over time: all of it, and without the states of
prompts read before, which grow up to `--prefix-mib`. `--abuse` adds clients that go away,
and requests that are malformed, too large or not UTF-8. Then: 32 requests at once against one after
another, and the time to the first token of a prompt that shares 8k tokens with one read before.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from respike.bench.machine import provenance

WORDS = [
    "harbour", "rain", "stone", "ledger", "window", "copper", "letter", "bridge", "winter", "paper",
    "river", "candle", "market", "engine", "garden", "signal", "button", "forest", "anchor",
    "silver",
]  # fmt: skip
SHARED_WORDS, BATCH_TOKENS = 7600, 48
PREFIX_BYTES = r"^respike_prefix_bytes ([-+.e\d]+)$"
BAD: list[tuple[bytes, str]] = [
    (b"{", "application/json"),
    (b'{"prompt": "\xff"}', "application/json"),
    (b'{"prompt": 5, "florp": 1}', "application/json"),
    (b"\x00" * 2000, "application/octet-stream"),
    (b'{"prompt": "' + b"x" * (9 << 20) + b'"}', "application/json"),
]


def prose(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


class Tally:
    """What happened to the streams."""

    def __init__(self) -> None:
        self.done = self.lost = self.tokens = self.left = self.bad = self.server_errors = 0
        self.longest_gap = 0.0
        self.first: list[float] = []


async def one_stream(
    client: httpx.AsyncClient, tally: Tally, rng: random.Random, leave: bool
) -> None:
    count = rng.choice([8, 32, 128])
    body = {
        "prompt": prose(rng.choice([5, 60, 700]), rng.randrange(10**9)),
        "max_tokens": count, "stream": True, "temperature": 1, "logprobs": 0,
    }  # fmt: skip
    got, began = 0, time.perf_counter()
    last: float | None = None
    ended = False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            tally.server_errors += answer.status_code >= 500
            tally.lost += answer.status_code != 429
            return
        async for line in answer.aiter_lines():
            if not line:
                continue
            if line == "data: [DONE]":
                ended = True
                break
            now = time.perf_counter()
            if last is None:
                tally.first.append(now - began)
            else:
                tally.longest_gap = max(tally.longest_gap, now - last)
            last, got = now, got + 1
            if leave and got > count // 2:
                tally.left += 1
                return
    tally.tokens += got
    tally.done += ended
    tally.lost += not ended


async def abuse(client: httpx.AsyncClient, tally: Tally, rng: random.Random) -> None:
    body, kind = rng.choice(BAD)
    found = await client.post("/v1/completions", content=body, headers={"content-type": kind})
    tally.bad += 1
    tally.server_errors += found.status_code >= 500


async def keep_running(
    client: httpx.AsyncClient, tally: Tally, until: float, rng: random.Random, bad: bool
) -> None:
    while time.monotonic() < until:
        if bad and rng.random() < 0.2:
            await abuse(client, tally, rng)
        await one_stream(client, tally, rng, bad and rng.random() < 0.3)


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith("VmRSS"))


async def load(address: str, pid: int, streams: int, seconds: float, bad: bool) -> dict[str, Any]:
    tally, memory = Tally(), []
    limits = httpx.Limits(max_connections=None)
    options: dict[str, Any] = {"base_url": address, "timeout": 600, "limits": limits}
    began, until = time.monotonic(), time.monotonic() + seconds
    async with httpx.AsyncClient(**options, trust_env=False) as client:

        async def watch() -> None:
            while time.monotonic() < until:
                told = (await client.get("/metrics")).text
                known = float(next(re.finditer(PREFIX_BYTES, told, re.MULTILINE))[1])
                memory.append((resident_bytes(pid), int(known)))
                await asyncio.sleep(max(0.5, seconds / 60))

        rngs = [random.Random(i) for i in range(streams)]
        await asyncio.gather(watch(), *(keep_running(client, tally, until, r, bad) for r in rngs))
    half, (first, last) = memory[len(memory) // 2 :], (memory[0], memory[-1])
    beside = [held - known for held, known in half]
    passed = time.monotonic() - began
    return {
        "seconds": passed, "streams": streams, "abuse": bad, "answers": tally.done,
        "lost": tally.lost, "clients_that_left": tally.left, "bad_requests": tally.bad,
        "server_errors": tally.server_errors, "tokens_per_second": tally.tokens / passed,
        "longest_gap_seconds": tally.longest_gap,
        "first_token_seconds": {"median": median(tally.first), "worst": max(tally.first)},
        "resident_bytes": {"begin": first[0], "middle": half[0][0], "end": last[0],
                           "most": max(held for held, _ in memory)},
        "known_prompts_bytes": {"begin": first[1], "middle": half[0][1], "end": last[1]},
        "rest_over_second_half_frac": max(beside) / min(beside) - 1,
    }  # fmt: skip


async def at_once(address: str, streams: int) -> dict[str, Any]:
    """The same requests together, and one after another."""
    bodies = [{"prompt": prose(40, i), "max_tokens": BATCH_TOKENS, "temperature": 1, "seed": i}
              for i in range(streams)]  # fmt: skip
    times, counts = {}, {}
    async with httpx.AsyncClient(base_url=address, timeout=600, trust_env=False) as client:

        async def post(body: dict[str, Any]) -> int:
            found = (await client.post("/v1/completions", json=body)).json()
            return int(found["usage"]["completion_tokens"])

        began = time.perf_counter()
        counts["together"] = sum(await asyncio.gather(*map(post, bodies)))
        times["together"] = time.perf_counter() - began
        began = time.perf_counter()
        counts["in_turn"] = sum(
            [await post(body | {"seed": 1000 + i}) for i, body in enumerate(bodies)]
        )
        times["in_turn"] = time.perf_counter() - began
    return {f"{name}_tokens_per_second": counts[name] / times[name] for name in times}


async def shared_prefix(address: str) -> dict[str, Any]:
    """Seconds to the first token of a long prompt, and of another with the same beginning."""
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=address, timeout=600, trust_env=False) as client:
        for name in ("unknown", "known"):
            body = {"prompt": prose(SHARED_WORDS, 1) + f" {name} end", "max_tokens": 1}
            began = time.perf_counter()
            usage = (await client.post("/v1/completions", json=body)).json()["usage"]
            found[f"{name}_seconds"] = time.perf_counter() - began
            found[f"{name}_cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
            found["prompt_tokens"] = usage["prompt_tokens"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--abuse", action="store_true")
    parser.add_argument("--prefix-mib", type=int, default=256)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = [
        sys.executable, "-m", "respike", "serve", options.model, "--port", "0",
        "--weights", options.weights, "--threads", str(options.threads),
        "--max-streams", str(options.streams), "--prefix-mib", str(options.prefix_mib),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            address = line.rsplit(" at ", 1)[1].strip()
            wait_for(address)
            result: dict[str, Any] = {"model": Path(options.model).name} | provenance()
            run = load(address, server.pid, options.streams, options.seconds, options.abuse)
            result["load"] = asyncio.run(run)
            result["at_once"] = asyncio.run(at_once(address, options.streams))
            result["shared_prefix"] = asyncio.run(shared_prefix(address))
            result["stderr"] = "" if server.poll() is None else server.stderr.read()
        finally:
            server.terminate()
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def wait_for(address: str) -> None:
    """Until it answers."""
    for _ in range(600):
        try:
            if httpx.get(f"{address}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
