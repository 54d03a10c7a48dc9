"""Many clients of a server at once: some ask badly, some go away, and the others compare what they get."""

import asyncio
import random
import time
from collections import Counter
from typing import Any, NamedTuple

import httpx


class Asked(NamedTuple):
    """The body of a request of `/v1/completions`, and the text that answers it."""

    body: dict[str, Any]
    text: str


def visit(url: str, asked: list[Asked], bad: dict[str, Any], clients: int, seconds: float, key: str = "") -> Counter:
    """Lets so many clients ask for some seconds, and counts what became of their requests.

    Args:
        url: of the server.
        asked: what a client may ask.
        bad: what makes a request one that the server refuses.
        key: the API key, if the server has one.

    Returns:
        How many requests were answered `"right"` or `"wrong"`, `"refused"`, `"cancelled"`, told that the server is
        `"busy"`, or ended with another status, as `"500"`.
    """
    return asyncio.run(_visit(url, asked, bad, clients, seconds, {"Authorization": f"Bearer {key}"} if key else {}))


async def _visit(url: str, asked: list[Asked], bad: dict, clients: int, seconds: float, headers: dict) -> Counter:
    counts: Counter = Counter()
    end = time.monotonic() + seconds
    address = f"{url}/v1/completions"

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            body, text = draw.choice(asked)
            chance = draw.random()
            if chance < 0.1:
                reply = await http.post(address, json={**body, **bad})
                counts["refused" if reply.status_code == 400 else str(reply.status_code)] += 1
            elif chance < 0.25:
                async with http.stream("POST", address, json={**body, "stream": True}) as stream:
                    lines = stream.aiter_lines()
                    for _ in range(draw.randint(1, 8)):
                        await anext(lines, None)
                counts["cancelled" if stream.status_code == 200 else str(stream.status_code)] += 1
            else:
                reply = await http.post(address, json=body)
                if reply.status_code == 200:
                    counts["right" if reply.json()["choices"][0]["text"] == text else "wrong"] += 1
                elif reply.status_code == 429:
                    counts["busy"] += 1
                    await asyncio.sleep(1)
                else:
                    counts[str(reply.status_code)] += 1

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=clients), headers=headers) as http:
        await asyncio.gather(*map(client, range(clients)))
    return counts
