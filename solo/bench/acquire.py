"""Bench of acquire: samples a second and core, against the plain img2dataset command on the same loopback origin.

In: nothing; pictures are made here (1/f noise with edges, JPEG quality 85). Out: one dict. Ours is the whole acquire
part: guard, robots.txt, consent, hash, probe, outcome table and raw tars. The reference is img2dataset's command with
the same sizes in its fastest form (`--skip_reencode`, no hash, no EXIF). Both run in turn, A B A B, for each of three
mixes; CPU seconds of all their processes are sampled and what a list of one URL costs is taken off both, since only a
short bench would notice it. The origin is a process of its own. Cost: about five minutes.
"""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from solo.acquire import download
from solo.acquire import part as acquire
from solo.acquire.raw import OUTCOMES
from solo.acquire.url_rows import rows_per_shard
from solo.artifact import Artifact, Job, make
from solo.sample import read_samples

MIXES: dict[str, dict[tuple[int, int], float]] = {
    "500": {(500, 375): 1.0},
    "1024": {(1024, 768): 1.0},
    "40/40/20": {(500, 375): 0.4, (1024, 768): 0.4, (2048, 1536): 0.14, (4000, 3000): 0.06},
}
N_URLS = {"500": 4_000, "1024": 2_000, "40/40/20": 1_000}
N_PICTURES = 12  # of each size
MAX_SIDE_PX = 1024
QUALITY = 85
REPEATS = 3
GOALS = {"500": 1.0, "1024": 1.5, "40/40/20": 1.5}
WATCH_S = 0.1
SEED = 20
HOST = "bench.test"


def run(
    *, repeats: int = REPEATS, n_urls: Mapping[str, int] = N_URLS, mixes: Sequence[str] = tuple(MIXES)
) -> dict[str, Any]:
    """The mixes, ours and the reference in turn."""
    served = pictures()
    with tempfile.TemporaryDirectory(prefix="solo-bench-") as name, origin(served) as port:
        folder = Path(name)
        one = {who: measured(who, {(500, 375): 1.0}, 1, port, folder / f"one-{who}") for who in ("ours", "plain")}
        found = {}
        for mix in mixes:
            runs = [_turn(mix, n_urls[mix], port, folder / f"{i}-{mix.replace('/', '-')}") for i in range(repeats)]
            found[mix] = _compared(mix, n_urls[mix], runs, one)
            found[mix]["psnr_db"] = psnr(folder / f"0-{mix.replace('/', '-')}", served)

    worst = min(found.values(), key=lambda m: float(m["ratio"]) / float(m["goal"]))
    return {
        "bench": "acquire",
        "ratio": worst["ratio"],
        "mixes": found,
        "one_url": {who: {k: round(v, 2) for k, v in cost.items()} for who, cost in one.items()},
        "repeats": repeats,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "n_cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
        },
    }


def _turn(mix: str, n: int, port: int, folder: Path) -> dict[str, dict[str, float]]:
    """Both sides once, one after the other."""
    folder.mkdir()
    return {who: measured(who, MIXES[mix], n, port, folder / who) for who in ("ours", "plain")}


def _compared(
    mix: str, n: int, runs: list[dict[str, dict[str, float]]], one: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    side = {who: _side(n, [turn[who] for turn in runs], one[who]) for who in one}
    return {
        "ratio": round(side["ours"]["samples_per_core_s"] / side["plain"]["samples_per_core_s"], 2),
        "ratio_with_start": round(side["plain"]["cpu_s"] / side["ours"]["cpu_s"], 2),
        "ratio_wall": round(side["plain"]["wall_s"] / side["ours"]["wall_s"], 2),
        "goal": GOALS[mix],
        "urls": n,
        **side,
    }


def _side(n: int, costs: list[dict[str, float]], one: Mapping[str, float]) -> dict[str, Any]:
    """Median rate without the start, its spread, and the peaks of memory."""
    rates = sorted((n - 1) / max(cost["cpu_s"] - one["cpu_s"], 1e-3) for cost in costs)
    return {
        "samples_per_core_s": round(statistics.median(rates)),
        "from_to": [round(rates[0]), round(rates[-1])],
        "cpu_s": round(statistics.median(cost["cpu_s"] for cost in costs), 2),
        "wall_s": round(statistics.median(cost["wall_s"] for cost in costs), 2),
        "peak_process_mb": round(max(cost["peak_process_mb"] for cost in costs)),
        "peak_all_mb": round(max(cost["peak_all_mb"] for cost in costs)),
    }


def measured(who: str, sizes: Mapping[tuple[int, int], float], n: int, port: int, folder: Path) -> dict[str, float]:
    """CPU and wall seconds, and peaks of memory, of one side on one list."""
    folder.mkdir()
    host = HOST if who == "ours" else f"127.0.0.1:{port}"
    urls = [f"http://{host}/{w}x{h}/{i % N_PICTURES}.jpg?n={i}" for i, (w, h) in enumerate(_spread(sizes, n))]
    captions = [f"picture {i}" for i in range(n)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "urls.parquet")
    arguments = [str(folder), str(port)] if who == "ours" else plain(folder, n)
    command = [sys.executable, "-m", "solo.bench.acquire", *arguments] if who == "ours" else arguments
    with (folder / "log").open("wb") as log:
        began = time.monotonic()
        env = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        cost = watch(process)
        cost["wall_s"] = time.monotonic() - began
    n_ok = stored(folder, who)
    if process.returncode or n_ok != n:
        tail = (folder / "log").read_text(errors="replace")[-800:]
        raise RuntimeError(f"bench acquire: {who} stored {n_ok} of {n}, exit code {process.returncode}: {tail}")
    return cost


def _spread(sizes: Mapping[tuple[int, int], float], n: int) -> Iterator[tuple[int, int]]:
    """Sizes in their shares, evenly over the list."""
    owed = dict.fromkeys(sizes, 0.0)
    for _ in range(n):
        for size, share in sizes.items():
            owed[size] += share
        size = max(owed, key=lambda s: owed[s])
        owed[size] -= 1
        yield size


def plain(folder: Path, n: int) -> list[str]:
    """img2dataset's own command for what a spec asks of ours."""
    options = {
        **{"url_list": folder / "urls.parquet", "input_format": "parquet", "caption_col": "caption"},
        **{"output_folder": folder / "out", "output_format": "webdataset", "processes_count": 1, "thread_count": 16},
        **{"image_size": MAX_SIDE_PX, "resize_mode": "keep_ratio_largest", "resize_only_if_bigger": True},
        **{"skip_reencode": True, "encode_quality": 95, "compute_hash": None, "extract_exif": False},
        **{"number_sample_per_shard": rows_per_shard(n), "enable_wandb": False},
    }
    return [str(download.environment()), "-I", "-m", "img2dataset.main", *(f"--{k}={v}" for k, v in options.items())]


def ours(folder: Path, port: int) -> Artifact:
    """The acquire part on one list."""
    args = {
        **{"url_column": "url", "caption_column": "caption", "timeout_s": 10, "max_side_px": MAX_SIDE_PX},
        **{"user_agent": "solo-bench/1 (bench@localhost.test)", "loopback_ports": {HOST: port}},
        **{"host_concurrency": 16, "host_requests_per_s": 1e6},
    }
    spec = {"location": "urls.parquet", "adapter": "url_list.download", "args": args, "samples_per_shard": 1_000}
    asked = {"source": "bench", "revision": "0" * 40, "acquire": spec}
    return make(Job("acquire", "bench", acquire.VERSION, asked, {}, folder / "root", folder, 1), acquire.run)[0]


def stored(folder: Path, who: str) -> int:
    """How many samples a side has stored."""
    if who == "plain":
        return sum(json.loads(p.read_text())["successes"] for p in (folder / "out").glob("*_stats.json"))
    tables = [pq.read_table(p, columns=["status"])["status"].to_pylist() for p in folder.rglob(OUTCOMES)]
    return sum(status == "ok" for table in tables for status in table)


def watch(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """CPU seconds of a process and all that it starts, by its last sample of each, and their largest memory."""
    cpu: dict[tuple[int, float], float] = {}
    peak_process, peak_all = 0, 0
    while process.poll() is None:
        total = 0
        with _gone():
            top = psutil.Process(process.pid)
            for one in [top, *top.children(recursive=True)]:
                with _gone(), one.oneshot():
                    times, memory = one.cpu_times(), one.memory_info().rss
                    cpu[one.pid, one.create_time()] = times.user + times.system
                    peak_process, total = max(peak_process, memory), total + memory
        peak_all = max(peak_all, total)
        time.sleep(WATCH_S)
    return {
        "cpu_s": sum(cpu.values()),
        "peak_process_mb": peak_process / 1e6,
        "peak_all_mb": peak_all / 1e6,
    }


@contextmanager
def _gone() -> Iterator[None]:
    """A process may end between two looks at it."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        yield


def pictures() -> dict[str, bytes]:
    """Path -> JPEG: 1 / f**1.4 noise, which at quality 85 costs what photographs cost, cut by straight edges."""
    rng = np.random.default_rng(SEED)
    height, width = 3_000, 4_000
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(fy, fx), 1 / width) ** 1.4
    grey = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * fall, (height, width))
    tint = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * fall**1.3, (height, width))
    grey, tint = grey / grey.std() * 45 + 120, tint / tint.std() * 20
    for _ in range(40):
        y, x = rng.integers(0, height - 300), rng.integers(0, width - 300)
        grey[y : y + rng.integers(40, 300), x : x + rng.integers(40, 300)] += rng.normal(0, 35)
    base = Image.fromarray(np.stack([grey + tint, grey, grey - tint], -1).clip(0, 255).astype(np.uint8))
    found = {}
    for size in {size for sizes in MIXES.values() for size in sizes}:
        for i in range(N_PICTURES):
            turned = base.transpose(Image.Transpose(i % 7)) if i % 7 not in (2, 4, 5, 6) else base
            box = (i * 31, i * 17, turned.width - i * 40, turned.height - i * 30)
            out = io.BytesIO()
            turned.resize(size, Image.Resampling.LANCZOS, box).save(out, "JPEG", quality=QUALITY)
            found[f"/{size[0]}x{size[1]}/{i}.jpg"] = out.getvalue()
    return found


def psnr(folder: Path, found: Mapping[str, bytes]) -> dict[str, float | None]:
    """Lowest PSNR of what was stored against a full decode and a box resize; None where the bytes are as served."""
    lowest: dict[str, float | None] = {}
    seen = set()
    for tar in sorted(folder.rglob("raw/*.tar")):
        for sample in read_samples(tar):
            size, name = sample.meta["url"].partition("?")[0].split("/")[3:5]
            data, served = sample.images[0], found[f"/{size}/{name}"]
            if (size, name) in seen:
                continue
            seen.add((size, name))
            lowest.setdefault(size, None)
            if data != served:
                exact = Image.open(io.BytesIO(served)).convert("RGB")
                got = _psnr(exact, Image.open(io.BytesIO(data)).convert("RGB"))
                lowest[size] = round(min(lowest[size] or 99.0, got), 2)
    return lowest


def _psnr(exact: Image.Image, got: Image.Image) -> float:
    small = exact.resize(got.size, Image.Resampling.BOX)
    error = np.mean((np.asarray(small, np.float64) - np.asarray(got, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(float(error), 1e-9)))


@contextmanager
def origin(found: Mapping[str, bytes]) -> Iterator[int]:
    """Serve pictures from memory by another process; its port."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(dict(found), there), daemon=True)
    process.start()
    there.close()  # so that an origin which dies at once is an EOFError here, not a wait
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def _serve(found: dict[str, bytes], pipe: Any) -> None:  # noqa: ANN401 - a pipe end of any context
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                body = found.get(head.split(" ", 2)[1].partition("?")[0])
                closes = "connection: close" in head.lower()
                status = "404 None" if body is None else "200 OK"
                kind = "Content-Type: image/jpeg\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
                ends = "Connection: close\r\n" if closes else ""
                text = f"HTTP/1.1 {status}\r\nServer: bench\r\n{kind}{ends}Content-Length: {len(body or b'')}\r\n\r\n"
                writer.write(text.encode() + (body or b""))
                await writer.drain()
                if closes:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


if __name__ == "__main__":
    if len(sys.argv) == 3:
        ours(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        sys.stdout.write(json.dumps(run()) + "\n")
