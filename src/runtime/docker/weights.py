"""Makes a Hugging Face repository present in the cache that vLLM reads. Runs in the model's image.

Argument: {"repo", "revision", "download_dir"} as JSON. Says what happens on stdout, one line each:
WHARF {"event": …}. The last one is `present`, `skip` or `fault`. Other lines are for people.
Ends when its stdin does, so that it does not outlive the Wharf that started it.
"""
import errno
import glob
import json
import os
import re
import shutil
import sys
import threading
import time

TICK_SECONDS = 0.5
STALL_SECONDS = 300
ASK_SECONDS = 10
# What vLLM loads, in its order; a repository often holds the same weights several times.
LOADED = (".safetensors", ".bin", ".pt")
OTHER = (".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".tflite")
OTHER_DIRS = ("original/", "onnx/", "openvino/", "coreml/")
SHARD = re.compile(r"^(.*-)(\d+)(-of-)(\d+)(\.\w+)$")
lock = threading.Lock()


def say(event, **more):
    with lock:
        print("WHARF " + json.dumps({"event": event, **more}), flush=True)


def end(event, **more):
    say(event, **more)
    os._exit(0)


def live_no_longer_than_stdin():
    def wait():
        while os.read(0, 4096):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def existing(path):
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def outlives_the_container(path):
    return os.stat(existing(path)).st_dev != os.stat("/").st_dev


def kind_of(error):
    """denied, missing, disk, readonly, network or failed. By names: they outlive versions."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for error in chain:
        names = {base.__name__ for base in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", None)
        # The hub answers 401, not 404, to whoever may not know whether a repository exists.
        if "GatedRepoError" in names or status in (401, 403):
            return "denied"
        if {"RepositoryNotFoundError", "RevisionNotFoundError"} & names or status == 404:
            return "missing"
        if status is not None:
            return "failed"
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return "disk"
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            return "readonly"
    for error in chain:
        modules = {base.__module__.split(".")[0] for base in type(error).__mro__}
        if isinstance(error, (ConnectionError, TimeoutError)) or modules & {
            "requests", "urllib3", "httpx", "httpx2", "httpcore", "socket", "ssl",
        }:
            return "network"
    return "failed"


def words_of(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:600] or type(error).__name__


def chosen(names):
    """The files that vLLM reads."""
    names = [name for name in names if not name.startswith(OTHER_DIRS) and not name.endswith(OTHER)]
    loaded = next((end for end in LOADED if any(name.endswith(end) for name in names)), None)
    others = tuple(end for end in LOADED if end != loaded)
    return [name for name in names if not name.endswith(others)]


def snapshot(cache, repo, revision):
    """Folder of the snapshot that an earlier download left; it need not be there."""
    root = os.path.join(cache, "models--" + repo.replace("/", "--"))
    try:
        with open(os.path.join(root, "refs", revision), encoding="utf-8") as file:
            revision = file.read().strip()
    except OSError:
        pass
    return os.path.join(root, "snapshots", revision)


def complete(folder):
    """Whether a snapshot can be loaded as it is: all that can be told without the hub."""
    names = [os.path.relpath(path, folder) for path in glob.glob(glob.escape(folder) + "/**", recursive=True)]
    weights = [name for name in names if name.endswith(LOADED)]
    wanted = set()
    for index in (name for name in names if name.endswith(".index.json")):
        with open(os.path.join(folder, index), encoding="utf-8") as file:
            files = json.load(file).get("weight_map", {}).values()
        wanted.update(os.path.join(os.path.dirname(index), name) for name in files)
    for start, number, of, count, rest in (m.groups() for m in map(SHARD.match, weights) if m):
        for n in range(1, int(count) + 1):
            wanted.add(f"{start}{n:0{len(number)}}{of}{count}{rest}")
    return bool(weights) and wanted <= set(names)


class Download:
    def __init__(self, hub, want, cache, info):
        self.want, self.cache = want, cache
        self.blobs = os.path.join(cache, "models--" + want["repo"].replace("/", "--"), "blobs")
        # Left by an earlier run and not continued by it.
        self.stale = set(glob.glob(os.path.join(glob.escape(self.blobs), "*.*.incomplete")))
        names = set(chosen([file.rfilename for file in info.siblings]))
        self.files, self.here = [], set()
        for file in (file for file in info.siblings if file.rfilename in names):
            name, lfs = file.rfilename, getattr(file, "lfs", None)
            sha = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
            self.files.append((name, sha or file.blob_id, file.size or 0))
            path = hub.try_to_load_from_cache(
                want["repo"], name, cache_dir=cache, revision=info.sha)
            if isinstance(path, str):
                self.here.add(name)
        self.total = sum(size for _, _, size in self.files)

    def parts(self, etag):
        blob = os.path.join(self.blobs, etag or "-")
        parts = [blob, blob + ".incomplete", *glob.glob(glob.escape(blob) + ".*.incomplete")]
        return [part for part in parts if part not in self.stale]

    def done(self):
        """Bytes here, and something that changes whenever any are written."""
        done, mark = 0, []
        for name, etag, size in self.files:
            if name in self.here:
                done += size
                continue
            have = 0
            for part in self.parts(etag):
                try:
                    stat = os.stat(part)
                except OSError:
                    continue
                have = max(have, stat.st_size)
                mark.append((part, stat.st_size, stat.st_blocks, stat.st_mtime_ns))
            done += min(have, size)
        return done, mark

    def report(self):
        last, since = None, time.monotonic()
        while True:
            done, mark = self.done()
            say("bytes", done=done, total=self.total)
            if mark != last:
                last, since = mark, time.monotonic()
            elif time.monotonic() - since > STALL_SECONDS:
                end("fault", kind="stalled", text=f"nothing arrived for {STALL_SECONDS} s")
            time.sleep(TICK_SECONDS)

    def run(self, hub):
        need, at = self.total - self.done()[0], existing(self.cache)
        free = shutil.disk_usage(at).free
        say("plan", total=self.total, need=need, free=free, path=at)
        if need > free:
            end("fault", kind="disk", text="")
        threading.Thread(target=self.report, daemon=True).start()
        hub.snapshot_download(
            self.want["repo"], revision=self.want["revision"], cache_dir=self.cache,
            allow_patterns=[glob.escape(name) for name, _, _ in self.files],
        )


def main():
    want = json.loads(sys.argv[1])
    live_no_longer_than_stdin()
    if os.path.isdir(want["repo"]):
        end("present", note="a folder of the image or of a volume")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants
    except ImportError as error:
        end("skip", why=f"its image has no huggingface_hub ({error})")
    if constants.HF_HUB_OFFLINE:
        end("skip", why="HF_HUB_OFFLINE is set in its image")
    cache = want["download_dir"] or constants.HF_HUB_CACHE
    if not outlives_the_container(cache):
        end("skip", why=f"{cache} is on no volume, so they would be lost with the container")
    try:
        info = hub.HfApi().model_info(
            want["repo"], revision=want["revision"], files_metadata=True, timeout=ASK_SECONDS)
        download = Download(hub, want, cache, info)
        if len(download.here) < len(download.files):
            download.run(hub)
        end("present", note="")
    except Exception as error:
        # What is complete here needs nobody's permission, and no network.
        if complete(snapshot(cache, want["repo"], want["revision"] or "main")):
            end("present", note=f"taken as they are in {cache}: {words_of(error)}")
        end("fault", kind=kind_of(error), text=words_of(error), hub=constants.ENDPOINT)


if __name__ == "__main__":
    main()
