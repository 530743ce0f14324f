"""A worker process without a front door: it takes its orders, says that it is ready, and notes what it is told.

Its deployment's model says how it behaves: `well`, `crash` (exit code 4 before it is ready), `stubborn` (deaf to
SIGTERM). What it is told about servers it writes to `told-INDEX` beside its socket, one line each time.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from aiohttp import web

from orchestrator.workers.orders import Orders


async def serve(orders: Orders) -> None:
    told = []

    async def servers(http: web.Request) -> web.Response:
        told.append((await http.read()) + b"\n")
        (orders.folder / f"told-{orders.index}").write_bytes(b"".join(told))
        return web.json_response({})

    async def drain(http: web.Request) -> web.Response:
        await http.json()
        return web.json_response({"num_left": orders.index})

    app = web.Application()
    app.router.add_put("/servers", servers)
    app.router.add_post("/drain", drain)
    runner = web.AppRunner(app)
    await runner.setup()
    path = orders.socket_of(orders.index)
    path.unlink(missing_ok=True)
    await web.UnixSite(runner, path).start()
    sys.stdout.write(f"READY worker pid={orders.index}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    ours = Orders.read(sys.stdin.buffer)
    if ours.config.model == "crash":
        sys.stdout.write("it is a bad day\n")
        sys.exit(4)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ours.config.model == "stubborn" else signal.SIG_DFL)
    asyncio.run(serve(ours))
