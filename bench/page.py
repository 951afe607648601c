"""Measures how much longer a clip takes on the page of app.py than in the pipeline, and what uploads leave behind.

    OMP_NUM_THREADS=1 python -m bench.page MODEL CLIP > results/page.md

Three ways alternate: the pipeline in this process, with `return_timestamps=True`; a program that uploads the clip to
the page and gets its answer; and Chromium, from the click to the answer, after the upload. CPU time is that of the
model's process and of its decoder, without the browser. Then the clip is uploaded many times, and the memory, the
processes and the open files of the server are compared. The benchmark needs Linux and Chromium.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
from gradio_client import Client, handle_file
from playwright.sync_api import sync_playwright
from transformers import pipeline


ROOT = Path(__file__).resolve().parents[1]
ROUNDS, UPLOADS = 7, 10
GOAL = 1.3
# Seconds from the click to the answer, on the clock of the browser.
CLICK = """() => new Promise((done) => {
    const begun = performance.now();
    const look = () => document.querySelector(".egmf-downloads") && done((performance.now() - begun) / 1000);
    new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
    document.querySelector("#ask").click();
})"""


def start_page(model: str) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), model, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            httpx2.get(url)
            return process, url
        except httpx2.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"app.py: got status {process.returncode} at its start, wanted a page")


def cpu_of(pid: int) -> float:
    """CPU seconds of a process and of the workers that decode for it."""
    workers = [child for child in children_of(pid) if b"egmf_worker" in Path(f"/proc/{child}/cmdline").read_bytes()]
    times = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in [pid, *workers]]
    return sum(int(fields[11]) + int(fields[12]) for fields in times) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def measure(answer: Callable, pid: int) -> tuple[float, float]:
    """Seconds, as `answer` returns them or else on our clock, and CPU seconds of a process, for an answer."""
    begun, used = time.perf_counter(), cpu_of(pid)
    seconds = answer()
    return seconds or time.perf_counter() - begun, cpu_of(pid) - used


def state_of(pid: int) -> tuple[float, int, int]:
    """Resident memory in MB, number of child processes and of open files."""
    memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return memory, len(children_of(pid)), len(os.listdir(f"/proc/{pid}/fd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("clip", help="a clip that is longer than those of the model's training")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    recognize = pipeline("affect-recognition", model=args.model, trust_remote_code=True)
    server, url = start_page(args.model)
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        with sync_playwright() as playwright:
            flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            client, page = Client(url, verbose=False), browser.new_page()
            page.set_default_timeout(300_000)  # other programs may slow it down

            def hear() -> None:
                recognize(args.clip, return_timestamps=True)

            def ask() -> None:
                answers = client.predict(file=handle_file(args.clip), words="", labels="", api_name="/answer")
                assert answers[-1]["error"] is None, answers[-1]["error"]

            def click() -> float:
                return page.evaluate(CLICK)

            ways = {"the pipeline": (hear, os.getpid())}
            ways["the page, for a program, with the upload"] = ask, server.pid
            ways["the page in Chromium, from the click"] = click, server.pid
            for _ in range(ROUNDS + 1):
                page.goto(url)
                page.set_input_files("#video input[type=file]", args.clip)
                page.wait_for_selector("#video video[src^=blob]")
                page.wait_for_timeout(500)
                for way, (answer, pid) in ways.items():
                    found.setdefault(way, []).append(measure(answer, pid))
            browser.close()
            before = state_of(server.pid)
            for _ in range(UPLOADS):
                ask()
            after = state_of(server.pid)
    finally:
        server.terminate()
        server.wait()
    seconds = recognize(args.clip, return_timestamps=True)["seconds"]
    print("# The page: time of an answer, and what uploads leave behind\n")
    print(
        "Command: `OMP_NUM_THREADS=1 python -m bench.page MODEL CLIP > results/page.md`, with the quickstart's model"
    )
    print(f"and a clip of {seconds:.0f} seconds. {os.cpu_count()} cores, load average before the run {load:.1f} (what")
    print(
        f"exceeds 0 is other programs). The first answer, and the median (lowest to highest) of {ROUNDS} interleaved"
    )
    print("rounds. CPU time is the mean of these rounds; other programs affect it less than the clock. Goal: at most")
    print(f"{GOAL} of the pipeline.\n")
    print("| way | first answer | median | CPU time | CPU time against the pipeline |")
    print("| --- | --- | --- | --- | --- |")
    base = statistics.mean(used for _, used in found["the pipeline"][1:])
    for way, ((first, _), *rounds) in found.items():
        times, used = [one for one, _ in rounds], statistics.mean(used for _, used in rounds)
        row = f"{first:.2f} s | {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
        print(f"| {way} | {row} | {1000 * used:.0f} ms | {used / base:.2f} |")
    print(f"\nThe server before and after {UPLOADS} more uploads:\n")
    print("| | memory | processes | open files |")
    print("| --- | --- | --- | --- |")
    for name, (memory, children, files) in (("before", before), ("after", after)):
        print(f"| {name} | {memory:.1f} MB | {children} | {files} |")


if __name__ == "__main__":
    main()
