"""Build the project's images from its Dockerfile and bring them to a cluster's node. Called by cluster.py.

An image goes through three stores:

1. the builder's (buildah's, under the cache; or a Docker engine's where there is one and no buildah);
2. an OCI layout under the cache: a folder of blobs named by their digest, not compressed. A push adds only new blobs;
3. containerd's content store: a blob that it lacks is hard-linked into it, so that it is neither copied nor kept twice.

The engine's layers hold gigabytes of torch, and a change of our source is a layer of a megabyte. With an ordinary
archive each change would cost two minutes; this way it costs the seconds that buildah takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from machine import cache_dir

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "docker.io/library/python:3.12-slim-bookworm"
TARGETS = ("engine", "operator")
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PULL_TIMEOUT_S = 300
CARRIED_BYTES = 16 * 2**20
"""A layer of our own source has 5 MB. Larger ones are linked into containerd's store: torch's has 4.7 GB."""
IMPORT_PAUSES_S = (1, 2, 4, 8)
SHORT_ID = 11
# How buildah and Docker announce the steps of a Dockerfile that take time; the others are done at once.
STEP = re.compile(r"(\[\S+\] )?(STEP \S+:|#\d+ \[[^]]*\]) (?P<command>RUN .*)")
REF_NAME = "org.opencontainers.image.ref.name"

Say = Callable[[str], None]
Inside = Callable[[Sequence[str]], list[str]]


class ImageError(Exception):
    """Says which image could not be made or loaded, and why."""


def name_of(target: str) -> str:
    """The local name of a Dockerfile target. Never `latest`: the kubelet would try to pull that."""
    return f"localhost/octavo-{target}:dev"


def has_any() -> bool:
    return (_folder() / "layout" / "index.json").exists()


def build(target: str, say: Say) -> None:
    """Build one target of the Dockerfile; unchanged layers come from the cache."""
    if target not in TARGETS:
        raise ImageError(f"the Dockerfile has the targets {' and '.join(TARGETS)}, not {target}")
    started = time.monotonic()
    with locked():
        if shutil.which("buildah"):
            _forget_interrupted()
            _ensure_base(say)
            command = [*_buildah(), "bud", "--isolation", "chroot", "--pull-never", "--layers", *_machine_settings()]
        elif _docker_answers():
            command = ["docker", "build"]
        else:
            raise ImageError("neither buildah nor a Docker engine is here: install buildah")
        if target == "engine":
            # There is no GPU here, and compiling for absent ones takes a minute after each change of the source.
            command += ["--build-arg", "KERNELS="]
        command += ["--target", target, "--tag", name_of(target), str(REPOSITORY)]
        log = _folder() / f"build-{target}.log"
        _run_logged(command, log, say, f"image {target}", _environment())
        log.replace(_folder() / f"built-{target}.log")
        if shutil.which("buildah"):
            _forget_unused_steps()
    say(f"built {name_of(target)} in {time.monotonic() - started:.1f} s")


def build_folder(folder: Path, image: str, say: Say) -> None:
    """Build an image of a folder with a Dockerfile, upon images that are here."""
    builder = [*_buildah(), "bud", "--isolation", "chroot", "--pull-never"] if shutil.which("buildah") else None
    with locked():
        command = [*(builder or ["docker", "build"]), "--tag", image, str(folder)]
        _run_logged(command, _folder() / "build-folder.log", say, image, _environment())


def ensure_base(say: Say) -> None:
    """Have the Dockerfile's base in buildah's store: the published one where it can be pulled, else one made here."""
    with locked():
        _ensure_base(say)


def _ensure_base(say: Say) -> None:
    if _image_id(BASE):
        return
    started = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        pulled = subprocess.run([*_buildah(), "pull", "-q", BASE], capture_output=True, timeout=PULL_TIMEOUT_S)
        if pulled.returncode == 0:
            say(f"pulled {BASE} in {time.monotonic() - started:.0f} s")
            return
    python = find_python()
    if python is None:
        raise ImageError(
            f"{BASE} can neither be pulled nor made here: making it takes a CPython 3.12 with its standard library. "
            "Install one (pyenv install 3.12, uv python install 3.12, or your distribution's), "
            "or name its interpreter in OCTAVO_PYTHON312."
        )
    say(f"{BASE} cannot be pulled here, so it is made from Debian packages and {python}")
    environment = _environment() | {"BUILDAH": " ".join(_buildah())}
    script = Path(__file__).with_name("base.sh")
    _run_logged(["bash", str(script), str(python), BASE], _folder() / "build-base.log", say, "base image", environment)
    say(f"made {BASE} in {time.monotonic() - started:.0f} s")


def find_python() -> Path | None:
    """A CPython 3.12's interpreter, outside any virtual environment, to be copied into the base image."""
    candidates = [Path(os.environ.get("OCTAVO_PYTHON312", "/nonexistent"))]
    if sys.version_info[:2] == (3, 12):
        candidates.append(Path(sys.base_prefix) / "bin/python3.12")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates += sorted(pyenv.glob("versions/3.12.*/bin/python3.12"), reverse=True)
    if shutil.which("uv"):
        found = subprocess.run(["uv", "python", "find", "--no-project", "3.12"], capture_output=True, text=True)
        candidates.append(Path(found.stdout.strip() or "/nonexistent"))
    candidates += [Path("/usr/local/bin/python3.12"), Path("/usr/bin/python3.12")]
    return next((path.resolve() for path in candidates if path.is_file()), None)


def load(image: str, inside: Inside, store: Path, say: Say) -> None:
    """Bring `image` into the containerd whose root is `store`; `inside` makes a command line run beside it."""
    started = time.monotonic()
    with locked():
        if not shutil.which("buildah"):
            _load_from_docker(image, inside)
        else:
            layout, manifest = push_to_layout(image)
            if manifest == _digests_in_containerd(inside).get(image):
                return
            _bring(image, layout, manifest, store, inside)
        _forget_older_builds(inside)
    say(f"loaded {image} in {time.monotonic() - started:.1f} s")


def _bring(image: str, layout: Path, manifest: str, store: Path, inside: Inside) -> None:
    """Give containerd what it lacks of the image, and have it named and unpacked.

    What an import carries is safe from containerd's garbage collection until the image names it. A large blob is not:
    it comes before the import, and a collection may take it in between. That import fails; its end has another
    collection made, which the next attempt waits for.
    """
    for pause_s in (*IMPORT_PAUSES_S, None):
        have = set(_ctr(inside, "content", "ls", "-q").split())
        carried = []
        for digest in _blobs(layout, manifest):
            if digest in have:
                continue
            if blob(layout, digest).stat().st_size > CARRIED_BYTES:
                _ingest(blob(layout, digest), digest, store, inside)
            else:
                carried.append(digest)
        done = _import(image, layout, manifest, carried, inside)
        if done.returncode == 0:
            return
        if pause_s is None:
            raise ImageError(f"containerd does not take {image}: {done.stderr.decode(errors='replace')}")
        time.sleep(pause_s)


def is_loaded(image: str, inside: Inside) -> bool:
    """Whether the node has exactly this build of the image."""
    if not shutil.which("buildah"):
        return False
    with locked():
        _, manifest = push_to_layout(image)
        return _digests_in_containerd(inside).get(image) == manifest


def push(image: str, registry: str) -> str:
    """Push to a registry that the user may write to. Returns the name there, which changes with the content."""
    identity = _image_id(image) if shutil.which("buildah") else _docker_id(image)
    target = f"{registry}/{image.removeprefix('localhost/').partition(':')[0]}:{identity.removeprefix('sha256:')[:12]}"
    if shutil.which("buildah"):
        subprocess.run([*_buildah(), "push", "-q", image, f"docker://{target}"], check=True)
    else:
        subprocess.run(["docker", "tag", image, target], check=True)
        subprocess.run(["docker", "push", "-q", target], check=True)
    return target


def hand_over(image: str, command: Sequence[str]) -> None:
    """Give an image to a tool that takes an archive's path as its last argument (kind, minikube)."""
    with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
        archive = Path(scratch) / "image.tar"
        if shutil.which("buildah"):
            subprocess.run([*_buildah(), "push", "-q", image, f"docker-archive:{archive}:{image}"], check=True)
        else:
            subprocess.run(["docker", "save", "-o", str(archive), image], check=True)
        subprocess.run([*command, str(archive)], check=True)


def pause_archive(source: Path) -> Path:
    """The image of the process that holds a pod's namespaces."""
    return program_archive(source, "localhost/pause:1")


def program_archive(source: Path, image: str) -> Path:
    """An image of one static program, compiled here from one C file: a docker archive of one layer."""
    name = source.stem
    target = _folder() / f"{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}.tar"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
        program = Path(scratch) / name
        subprocess.run(["gcc", "-static", "-Os", "-s", "-o", str(program), str(source)], check=True)
        layer = _tar({name: program.read_bytes()}, mode=0o755)
        config = json.dumps(
            {
                "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
                "os": "linux",
                "config": {"Entrypoint": [f"/{name}"]},
                "rootfs": {"type": "layers", "diff_ids": [_sha256(layer)]},
            }
        ).encode()
        manifest = json.dumps([{"Config": "config.json", "RepoTags": [image], "Layers": ["layer.tar"]}])
        archive = Path(scratch) / "image.tar"
        archive.write_bytes(_tar({"config.json": config, "layer.tar": layer, "manifest.json": manifest.encode()}))
        archive.rename(target)
    return target


def _folder() -> Path:
    folder = cache_dir() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One build or load at a time: they share the stores, and two would only slow each other down."""
    with (_folder() / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # buildah mounts its store over itself and leaves it so.
            for folder in mounts():
                subprocess.run(["umount", folder], capture_output=True)


def mounts() -> list[str]:
    """What is mounted below buildah's store, the last first."""
    rows = Path("/proc/self/mountinfo").read_text().splitlines()
    return [row.split()[4] for row in reversed(rows) if row.split()[4].startswith(f"{_storage()}/")]


def _storage() -> Path:
    return _folder() / "buildah"


def _buildah() -> list[str]:
    root, run = _storage() / "root", _storage() / "run"
    return ["buildah", "--root", str(root), "--runroot", str(run), "--storage-driver", "overlay"]


def _environment() -> dict[str, str]:
    """A commit writes the layer's gigabytes to a temporary file first: here, where an interrupted one is found."""
    scratch = _folder() / "scratch"
    scratch.mkdir(exist_ok=True)
    return os.environ | {"TMPDIR": str(scratch)}


def _forget_interrupted() -> None:
    """Remove what a build that was interrupted left: its working containers and half-written layers."""
    shutil.rmtree(_folder() / "scratch", ignore_errors=True)
    subprocess.run([*_buildah(), "rm", "--all"], check=True, capture_output=True)


def _forget_unused_steps() -> None:
    """Remove the images of build steps that the latest build of no target used: each holds its layer on the disk.

    buildah's own pruning would also take the ends of the stages that others copy from, and with them the cache.
    """
    listed = subprocess.run(
        [*_buildah(), "images", "--all", "--no-trunc", "--json"], check=True, capture_output=True, text=True
    )
    unnamed = [image["id"].partition(":")[2] for image in json.loads(listed.stdout) if not image["names"]]
    used = "".join(log.read_text(errors="replace") for log in _folder().glob("built-*.log"))
    # The log names a step's image by the first eleven digits, or by all of them where it comes from the cache.
    unused = [identity for identity in unnamed if identity[:SHORT_ID] not in used]
    while unused:
        # A step's image goes after those of the steps that stand on it.
        subprocess.run([*_buildah(), "rmi", *unused], capture_output=True)
        left = [identity for identity in unused if _image_id(identity)]
        if len(left) == len(unused):
            return
        unused = left


def _machine_settings() -> list[str]:
    """Mounts that let `RUN pip install` reach whatever package index this machine is set up for.

    They are there during the build only and leave nothing of this machine in the image.
    """
    settings = {}
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():  # global.index-url='https://…', or :env:.index-url='…'
        key, _, value = line.partition("=")
        name, value = key.rpartition(".")[2], value.strip("'\"")
        if name in ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "retries"):
            settings[name] = value
    if CA_BUNDLE.exists():
        settings["cert"] = str(CA_BUNDLE)
    conf = _folder() / "pip.conf"
    conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    options = ["--volume", f"{conf}:/etc/pip.conf:ro"]
    return options + (["--volume", f"{CA_BUNDLE}:{CA_BUNDLE}:ro"] if CA_BUNDLE.exists() else [])


def _docker_answers() -> bool:
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def _image_id(image: str) -> str:
    inspect = [*_buildah(), "inspect", "--type", "image", "--format", "{{.FromImageID}}", image]
    found = subprocess.run(inspect, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def _docker_id(image: str) -> str:
    inspect = ["docker", "image", "inspect", "--format", "{{.Id}}", image]
    return subprocess.run(inspect, check=True, capture_output=True, text=True).stdout.strip()


def push_to_layout(image: str) -> tuple[Path, str]:
    """Write the image into the OCI layout unless it is there. Returns the layout and the manifest's digest."""
    layout = _folder() / "layout"
    image_id = _image_id(image)
    if not image_id:
        raise ImageError(f"there is no image {image}: build it first (cluster.py image)")
    pushed = _folder() / "pushed.json"
    known: dict[str, list[str]] = json.loads(pushed.read_text()) if pushed.exists() else {}
    if known.get(image, [""])[0] != image_id or not (layout / "index.json").exists():
        storage = _storage()
        source = f"containers-storage:[overlay@{storage}/root+{storage}/run]{image}"
        # buildah's own push compresses again each time; this copies only what the layout does not have.
        copy = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-oci-accept-uncompressed-layers"]
        command = [*copy, source, f"oci:{layout}:{image}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ImageError(f"cannot write {image} to {layout}: {done.stderr}")
        # skopeo takes the name from the manifest that had it before, and leaves that one in the index.
        index = json.loads((layout / "index.json").read_text())
        named = {entry.get("annotations", {}).get(REF_NAME): entry for entry in index["manifests"]}
        named.pop(None, None)
        index["manifests"] = list(named.values())
        (layout / "index.json").write_text(json.dumps(index))
        known[image] = [image_id, named[image]["digest"]]
        pushed.write_text(json.dumps(known))
        _forget_unused(layout)
    return layout, known[image][1]


def _forget_unused(layout: Path) -> None:
    """Remove the blobs that no image of the layout names any more: each change of source leaves a layer behind."""
    manifests = [entry["digest"] for entry in json.loads((layout / "index.json").read_text())["manifests"]]
    used = {digest for manifest in manifests for digest in _blobs(layout, manifest)}
    for file in (layout / "blobs/sha256").iterdir():
        if f"sha256:{file.name}" not in used:
            file.unlink()


def _blobs(layout: Path, manifest: str) -> list[str]:
    content: dict[str, Any] = json.loads(blob(layout, manifest).read_text())
    return [manifest, content["config"]["digest"], *(layer["digest"] for layer in content["layers"])]


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _ctr(inside: Inside, *arguments: str) -> str:
    command = inside(["ctr", "-n", "k8s.io", *arguments])
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _digests_in_containerd(inside: Inside) -> dict[str, str]:
    rows = [line.split() for line in _ctr(inside, "images", "ls").splitlines()[1:]]
    return {row[0]: row[2] for row in rows}  # REF TYPE DIGEST …


def _forget_older_builds(inside: Inside) -> None:
    """Have containerd forget images that have lost their name to a newer build.

    It keeps each image by the digest of its configuration, too, as the kubelet asks for it, and would keep those for
    ever. What a container was made of stays as long as the container.
    """
    digests = _digests_in_containerd(inside)
    named = {digest for name, digest in digests.items() if not name.startswith("sha256:")}
    older = [name for name, digest in digests.items() if name.startswith("sha256:") and digest not in named]
    if older:
        _ctr(inside, "images", "rm", "--sync", *older)


def _ingest(file: Path, digest: str, store: Path, inside: Inside) -> None:
    """Make a blob known to containerd. A hard link at its place there leaves nothing to copy."""
    content = store / "io.containerd.content.v1.content/blobs" / digest.replace(":", "/")
    with contextlib.suppress(OSError):  # another file system, say: then ctr copies it
        os.link(file, content)
    size = str(file.stat().st_size)
    ingest = inside(
        ["ctr", "-n", "k8s.io", "content", "ingest", "--expected-digest", digest, "--expected-size", size, digest]
    )
    with file.open("rb") as source:
        subprocess.run(ingest, stdin=source, check=True, capture_output=True)


def _import(
    image: str, layout: Path, manifest: str, carried: Sequence[str], inside: Inside
) -> subprocess.CompletedProcess[bytes]:
    """Have containerd name and unpack the image: an archive of the index and of the blobs that it does not have yet."""
    entry = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": manifest,
        "size": blob(layout, manifest).stat().st_size,
        "annotations": {"io.containerd.image.name": image},
    }
    index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    blobs = {f"blobs/{digest.replace(':', '/')}": blob(layout, digest).read_bytes() for digest in carried}
    archive = _tar({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index} | blobs)
    return subprocess.run(inside(["ctr", "-n", "k8s.io", "images", "import", "-"]), input=archive, capture_output=True)


def _load_from_docker(image: str, inside: Inside) -> None:
    importing = inside(["ctr", "-n", "k8s.io", "images", "import", "-"])
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
        done = subprocess.run(importing, stdin=saved.stdout, capture_output=True, text=True)
    if saved.returncode != 0 or done.returncode != 0:
        raise ImageError(f"cannot load {image} from Docker: {done.stderr}")


def _run_logged(
    command: Sequence[str], log_file: Path, say: Say, title: str, environment: dict[str, str] | None = None
) -> None:
    """Run a long command. All that it writes goes to a log; the steps that take time are shown as they begin."""
    with (
        log_file.open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        ) as process,
    ):
        assert process.stdout
        held = ""
        for line in process.stdout:
            log.write(line)
            log.flush()
            if held and "Using cache" not in line and "CACHED" not in line:
                say(f"  {title}: {held[:100]}")
            step = STEP.match(line)
            held = step["command"] if step else ""
            if line.startswith("STEP: "):  # of base.sh
                say(f"  {title}: {line.removeprefix('STEP: ').strip()}")
    if process.returncode != 0:
        last = "".join(log_file.read_text(errors="replace").splitlines(keepends=True)[-15:])
        raise ImageError(f"{title} failed; the whole log is {log_file}\n{last}")


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _tar(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            _add(archive, name, data, mode)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))
