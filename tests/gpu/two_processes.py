#!/usr/bin/env python3
"""Two models that each want 60 % of a real GPU take turns under Wharf.

    cargo build --release
    tests/gpu/two_processes.py --wharf target/release/wharf [--rounds 3]

Needs an NVIDIA driver with NVML, and PyTorch or at least libcuda.so.1 (by ctypes). Asks for one
model, then the other, and so on, and exits 0 only if every answer came from the right model, which
an engine that met an out-of-memory cannot give. Prints for each swap how long after the exit of
the old engine its memory was proven free. `--simulate` goes through the same without a GPU.

`two_processes.py serve` is the engine that Wharf starts.
"""

import argparse
import ctypes
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FRACTION = 0.6
# What a CUDA context takes beside the memory asked for.
CONTEXT_MIB = 1024
SIMULATED_MIB = 24576
STARTUP_LIMIT_S = 30
ANSWER_LIMIT_S = 300


def by_torch(mib):
    import torch

    block = torch.empty(mib << 20, dtype=torch.uint8, device="cuda")
    block.fill_(1)
    torch.cuda.synchronize()
    return block


def by_libcuda(mib):
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()

    def call(name, *args):
        code = getattr(cuda, name)(*args)
        if code:
            raise MemoryError(f"{name} returned {code}" + (": out of memory" if code == 2 else ""))

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(mib << 20))
    call("cuMemsetD8_v2", address, ctypes.c_ubyte(1), ctypes.c_size_t(mib << 20))
    return address


def by_ledger(mib):
    folder, pid = pathlib.Path(os.environ["WHARF_VRAM_LEDGER"]), os.getpid()
    fields = pathlib.Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()
    entry = {"pid": pid, "start_ticks": int(fields[19]), "gpus": [0], "bytes": mib << 20}
    entry |= {"label": "two_processes.py", "instance": os.environ.get("WHARF_INSTANCE")}
    (folder / f"{pid}.tmp").write_text(json.dumps(entry))
    (folder / f"{pid}.tmp").rename(folder / f"{pid}.json")


def serve(args):
    if "WHARF_VRAM_LEDGER" in os.environ:
        allocate = by_ledger
    else:
        try:
            import torch  # noqa: F401

            allocate = by_torch
        except ImportError:
            allocate = by_libcuda
    began = time.monotonic()
    try:
        memory = allocate(args.mib)
    except Exception as error:  # torch.OutOfMemoryError is only there with torch
        print(f"CUDA out of memory? {type(error).__name__}: {error}", flush=True)
        sys.exit(3)
    seconds = time.monotonic() - began
    print(f"{args.mib} MiB taken {allocate.__name__} in {seconds:.2f} s", flush=True)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body):
            body = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer({"status": "ok"})

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            message = {"role": "assistant", "content": f"{args.name} answers"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer({"object": "chat.completion", "model": args.name, "choices": [choice]})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.memory = memory
    server.serve_forever()


def call(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def total_mib(simulate):
    if simulate:
        return SIMULATED_MIB
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def configuration(args, gateway, orchestrator):
    total = total_mib(args.simulate)
    mib = int(total * FRACTION)
    gpu = f"provider: simulated, memory: [{total}MiB], release_lag: 700ms"
    gpu = gpu if args.simulate else "provider: nvml"
    first = free_port()
    lines = [
        f"listen: {{ gateway: 127.0.0.1:{gateway}, orchestrator: 127.0.0.1:{orchestrator} }}",
        f"engine_ports: {first}-{min(first + 20, 65535)}",
        f"gpu: {{ {gpu} }}",
        "swap: { min_residency: 100ms, vram_timeout: 60s }",
        "models:",
    ]
    for name in ("ada", "bob"):
        command = f"{sys.executable} {pathlib.Path(__file__).resolve()} serve --name {name}"
        lines += [
            f"  {name}:",
            "    engine: openai",
            "    gpus: [0]",
            f"    vram: {mib + CONTEXT_MIB}MiB",
            f'    process: {{ cmd: "{command} --port ${{PORT}} --mib {mib}" }}',
        ]
    print(f"GPU 0 has {total} MiB; each of two models takes {mib} MiB", flush=True)
    return "\n".join(lines) + "\n"


def take_turns(args, gateway, orchestrator, wharf):
    until = time.monotonic() + STARTUP_LIMIT_S
    while True:
        try:
            if call(orchestrator, "/health")[0] == 200:
                break
        except OSError:
            pass
        if wharf.poll() is not None or time.monotonic() > until:
            sys.exit("wharf did not start")
        time.sleep(0.05)
    right = 0
    for name in ["ada", "bob"] * args.rounds:
        began = time.monotonic()
        body = {"model": name, "messages": [{"role": "user", "content": "who are you?"}]}
        status, answer = call(gateway, "/v1/chat/completions", body)
        seconds = time.monotonic() - began
        is_right = status == 200 and answer["model"] == name
        right += is_right
        text = "answered" if is_right else f"{status}: {json.dumps(answer)}"
        print(f"{name}: {text} after {seconds:.2f} s", flush=True)
    swaps = call(orchestrator, "/swaps?limit=100")[1]["swaps"]
    for swap in sorted(swaps, key=lambda swap: int(swap["id"][1:])):
        phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in swap["phases"].items())
        print(f"  {swap['id']} {swap['model']} {swap['result']}: {phases}")
    proofs = [swap["phases"]["prove"] for swap in swaps if swap["phases"].get("prove")]
    if proofs:
        print(f"from exit to proof: {min(proofs):.3f} to {max(proofs):.3f} s, {len(proofs)} swaps")
    return right == 2 * args.rounds


def drive(args):
    gateway, orchestrator = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "models.yaml").write_text(configuration(args, gateway, orchestrator))
        command = [pathlib.Path(args.wharf).resolve(), "serve", "--config", "models.yaml"]
        log = open(folder / "wharf.log", "w")
        wharf = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        ok = False
        try:
            ok = take_turns(args, gateway, orchestrator, wharf)
        finally:
            wharf.terminate()
            try:
                wharf.wait(60)
            except subprocess.TimeoutExpired:
                wharf.kill()
            if not ok:
                print((folder / "wharf.log").read_text()[-8000:], file=sys.stderr)
    print("passed" if ok else "FAILED")
    sys.exit(0 if ok else 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wharf", default="target/release/wharf")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--simulate", action="store_true")
    commands = parser.add_subparsers()
    engine = commands.add_parser("serve")
    engine.add_argument("--name", required=True)
    engine.add_argument("--port", type=int, required=True)
    engine.add_argument("--mib", type=int, required=True)
    engine.set_defaults(work=serve)
    args = parser.parse_args()
    getattr(args, "work", drive)(args)


main()
