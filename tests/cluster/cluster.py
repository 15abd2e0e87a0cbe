#!/usr/bin/env python3
"""A real single-node Kubernetes on this machine, for tests and for the demo: no Docker, no registry, no systemd.

A `Cluster` has a name; its life is

1. `up`: etcd, the API server, controllers, scheduler, kubelet, kube-proxy, DNS and containerd start in mount, network
   and PID namespaces of their own (node/start.sh). About five seconds. A crashed earlier run is cleaned up first.
2. Use: `run` a command inside, or use `kubeconfig` from outside; `load` images (images.py).
3. `down`: one SIGKILL ends the PID namespace and all in it; mounts and network go with it, cgroups are removed.
   A folder of images stays in the cache for the next cluster, so images need not be imported again.

Two names are two clusters, which may run side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import definitions
import images
import machine
import programs
import sizes

HERE = Path(__file__).resolve().parent
NODE = HERE / "node"
API_SERVER = "10.250.0.1:6443"
PKI = Path("/etc/kubernetes/pki")
STORES = 8
STORE_UNUSED_S = 2 * 24 * 3600
"""A store that was not used for longer holds images of builds that are gone, five gigabytes unpacked."""
DISK_FULL = 0.8
"""Share of the disk beyond which stores that nobody uses are given up: another is filled in a minute."""
UP_TIMEOUT_S = 120.0
DOWN_TIMEOUT_S = 20.0
# Go's caches and the programs; and the images in three forms (build store, layout, unpacked on the node), one layer of
# torch once more while it is committed. Measured, rounded up.
BUILD_BYTES = 9 * 2**30
IMAGE_BYTES = 20 * 2**30


class ClusterError(Exception):
    """Says what failed and where its log is."""


class NotReadyError(ClusterError):
    """A start that waits for something for longer than any machine took."""


class Cluster:
    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", name):
            raise ClusterError(f"a cluster's name has 1 to 32 lower-case letters, digits and dashes, got {name!r}")
        self.name = name
        self.state = machine.cache_dir() / "clusters" / name
        self.cgroup = f"octavo-{name}"
        self.logs = self.state / "logs"
        self.kubeconfig = self.state / "kubeconfig"

    def up(self, *, gpus: int = 0, kwok: bool = False) -> float:
        """Start the cluster unless it runs, and wait until a pod can be made. Returns the seconds that took."""
        started = time.monotonic()
        with self._locked():
            if not self.is_up():
                self._clean()
                try:
                    self._start(gpus)
                except NotReadyError as error:
                    # Seen once in some hundred starts, cause unknown: what it was waiting for is kept for whoever asks.
                    kept = machine.cache_dir() / "test-logs" / f"{self.name}-not-ready"
                    shutil.rmtree(kept, ignore_errors=True)
                    shutil.copytree(self.logs, kept)
                    print(f"{error}\nIts logs are kept in {kept}. Starting it once more.", file=sys.stderr)
                    self._clean()
                    self._start(gpus)
            if kwok:
                self.start_kwok()
        return time.monotonic() - started

    def down(self) -> None:
        """Stop the cluster and remove all but its image store. Nothing happens when there is none."""
        with self._locked():
            self._clean()

    def is_up(self) -> bool:
        return (self.state / "ready").exists() and self._init_pid() is not None

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in the cluster's namespaces, with KUBECONFIG and PATH set."""
        init = self._init_pid()
        if init is None:
            raise ClusterError(f"cluster {self.name} is not up")
        path = f"{programs.search_path()}{os.pathsep}{os.environ['PATH']}"
        environment = [f"KUBECONFIG={PKI}/admin.kubeconfig", f"PATH={path}"]
        enter = ["nsenter", f"--target={init}", "--mount", "--net", "--pid", f"--wd={os.getcwd()}"]
        return [*enter, "env", *environment, *command]

    def run(
        self, command: Sequence[str], *, stdin: str | None = None, timeout_s: float | None = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside and return what it wrote. A failure is a ClusterError that shows its words."""
        done = subprocess.run(
            self.inside(command),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise ClusterError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}{done.stdout}")
        return done

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        return self.run(["kubectl", *arguments], stdin=stdin, timeout_s=timeout_s).stdout

    def start_program(self, name: str, command: Sequence[str]) -> None:
        """Start a program inside, unless it runs; it logs to logs/NAME.log and ends with the cluster."""
        pid_file = self.state / "helpers" / name
        if pid_file.exists() and _is_alive(*_read_pid(pid_file)):
            return
        pid_file.parent.mkdir(exist_ok=True)
        with (self.logs / f"{name}.log").open("ab") as log:
            pid, start_time = self._spawn(self.inside(command), log)
        pid_file.write_text(f"{pid} {start_time}")

    def start_kwok(self) -> None:
        """Make nodes that carry the annotation kwok.x-k8s.io/node=fake behave as if they had a kubelet."""
        self.start_program(
            "kwok",
            [
                "kwok",
                f"--kubeconfig={PKI}/admin.kubeconfig",
                "--manage-all-nodes=false",
                "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
                "--node-lease-duration-seconds=40",
                "--cidr=10.245.0.0/16",
            ],
        )

    def start_prometheus(self) -> str:
        """Scrape pods that carry the prometheus.io/scrape annotation. Returns the API's URL on this machine."""
        listen = "127.0.0.1:9090"
        self.start_program(
            "prometheus",
            [
                "prometheus",
                f"--config.file={NODE}/prometheus.yml",
                f"--storage.tsdb.path={self.state}/prometheus",
                f"--web.listen-address={listen}",
            ],
        )
        return f"http://127.0.0.1:{self.forward(listen)}"

    def forward(self, target: str, listen_port: int = 0) -> int:
        """Make HOST:PORT of the cluster's network reachable on this machine's loopback. Returns the port there."""
        init = self._init_pid()
        if init is None:
            raise ClusterError(f"cluster {self.name} is not up")
        port_file = self.state / f"forward-{target.replace(':', '-')}-{listen_port}"
        log_file = self.logs / "forward.log"
        if not port_file.exists():
            with log_file.open("ab") as log:
                forward = [sys.executable, str(HERE / "forward.py"), f"/proc/{init}/ns/net", target]
                # Only the PID namespace is entered: the listening socket belongs to this machine's network.
                enter = ["nsenter", f"--target={init}", "--pid"]
                process = self._spawn([*enter, *forward, str(port_file), str(listen_port)], log)
            while not port_file.exists():
                if not _is_alive(*process):
                    raise ClusterError(f"cannot forward {target}:\n{log_file.read_text()[-1000:]}")
                time.sleep(0.02)
        return int(port_file.read_text())

    def load(self, image: str, say: Callable[[str], None]) -> None:
        """Bring a built image into the node's store, moving only what is not there yet."""
        images.load(image, self.inside, Path((self.state / "store").read_text()), say)

    def save_logs(self, target: Path) -> None:
        """Keep what explains a failure: every program's and pod's log, events, and all objects."""
        shutil.copytree(self.logs, target, dirs_exist_ok=True)
        pod_logs = self.state / "root/var/log/pods"
        shutil.copytree(pod_logs, target / "pods", dirs_exist_ok=True, ignore_dangling_symlinks=True)
        if self.is_up():
            for file, arguments in {
                "events.txt": ["get", "events", "-A", "--sort-by=.lastTimestamp"],
                "objects.txt": ["get", "nodes,pods,deployments,services,pvc,llmservers.octavo.dev", "-A", "-o", "wide"],
                "pods.txt": ["describe", "pods", "-A"],
            }.items():
                done = self.run(["kubectl", *arguments], check=False)
                (target / file).write_text(done.stdout + done.stderr)

    def leftovers(self) -> list[str]:
        """What is still on the machine of a cluster that should be gone. Empty is the promise of `down`."""
        found = [f"process {pid} ({_comm(pid)})" for pid in self._processes()]
        found += [f"mount {line.split()[4]}" for line in _mounts() if str(self.state) in line]
        found += [f"cgroup {path}" for path in self._cgroups()]
        found += [f"interface {name}" for name in ("node0", "cni0") if Path("/sys/class/net", name).exists()]
        return found + ([f"folder {self.state}"] if self.state.exists() else [])

    def _start(self, gpus: int) -> None:
        self.logs.mkdir(parents=True)
        store, store_lock = _take_store()
        (self.state / "store").write_text(str(store))
        environment = os.environ | {
            "HERE": str(NODE),
            "STATE": str(self.state),
            "STORE": str(store),
            "CGROUP": self.cgroup,
            "PROGRAMS": programs.search_path(),
            "PAUSE": str(images.pause_archive(NODE / "pause.c")),
            "GPUS": str(gpus),
            # Marks the cluster's processes, so that they can be found when all other traces are lost.
            "OCTAVO_CLUSTER": str(self.state),
        }
        unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with store_lock, (self.logs / "start.log").open("wb") as log:
            os.set_inheritable(store_lock.fileno(), True)
            process = self._spawn([*unshare, "bash", str(NODE / "start.sh")], log, environment)
        (self.state / "unshare").write_text(f"{process[0]} {process[1]}")
        deadline = time.monotonic() + UP_TIMEOUT_S
        while not (self.state / "ready").exists():
            died = not _is_alive(*process)
            if died or time.monotonic() > deadline:
                last = (self.logs / "start.log").read_text(errors="replace")[-2000:]
                why = "ended early" if died else f"was not ready within {UP_TIMEOUT_S:.0f} s"
                error = ClusterError if died else NotReadyError
                raise error(f"cluster {self.name} {why}; logs are in {self.logs}\n{last}")
            time.sleep(0.05)
        inner = (self.state / "root" / PKI.relative_to("/") / "admin.kubeconfig").read_text()
        port = self.forward(API_SERVER)
        partial = self.kubeconfig.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text(inner.replace(f"https://{API_SERVER}", f"https://127.0.0.1:{port}"))
        partial.rename(self.kubeconfig)

    def _spawn(
        self, command: Sequence[str], log: IO[bytes], environment: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """Start a process that outlives this one. Returns what tells it from all others: number and start time."""
        actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        outputs = [(os.POSIX_SPAWN_DUP2, log.fileno(), number) for number in (1, 2)]
        # A session of its own: an interrupt at the terminal ends this program, not the cluster.
        pid = os.posix_spawnp(
            command[0], list(command), environment or os.environ, file_actions=[*actions, *outputs], setsid=True
        )
        return pid, _start_time(pid)

    def _init_pid(self) -> int | None:
        """The first process of the cluster's PID namespace, as this machine numbers it."""
        file = self.state / "unshare"
        if not file.exists():
            return None
        pid, start_time = _read_pid(file)
        if not _is_alive(pid, start_time):
            return None
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None

    def _processes(self) -> list[int]:
        """Every live process that carries this cluster's mark or sits in its cgroup."""
        mark = f"OCTAVO_CLUSTER={self.state}".encode()
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    marked = mark in (entry / "environ").read_bytes().split(b"\0")
                    if marked or f"/{self.cgroup}/" in (entry / "cgroup").read_text():
                        found.add(int(entry.name))
        return sorted(found)

    def _cgroups(self) -> list[Path]:
        return sorted(machine.CGROUP.glob(f"*/{self.cgroup}"))

    def _clean(self) -> None:
        """Kill, then remove. Repeats until nothing is found, as processes and mounts take a moment to go."""
        deadline = time.monotonic() + DOWN_TIMEOUT_S
        while True:
            for pid in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            for top in self._cgroups():
                for folder, _, _ in os.walk(top, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(folder)
            shutil.rmtree(self.state, ignore_errors=True)
            left = self.leftovers()
            if not left:
                return
            if time.monotonic() > deadline:
                raise ClusterError(f"cluster {self.name} left behind: {'; '.join(left)}")
            time.sleep(0.05)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One `up` or `down` of a name at a time, whoever asks for it."""
        self.state.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{self.state}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _take_store() -> tuple[Path, IO[str]]:
    """A folder for containerd's images that no running cluster has, and the lock that keeps others out.

    Images stay in it from one cluster to the next, whatever their names, as unpacking torch takes a minute. The lock is
    handed down to the cluster's processes, so it ends with the last of them and never before.
    """
    folder = machine.cache_dir() / "stores"
    for number in range(STORES):
        if (lock := _lock_store(folder, number)) is not None:
            store = folder / str(number)
            store.mkdir(exist_ok=True)
            os.utime(store)
            _forget_unused_stores(folder, time.time())
            return store, lock
    raise ClusterError(f"{STORES} clusters run on this machine already")


def _lock_store(folder: Path, number: int) -> IO[str] | None:
    """None while a cluster has the store."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / f"{number}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _forget_unused_stores(folder: Path, now: float) -> None:
    """Remove stores that no cluster has: those that nobody has taken for days, and on a full disk the others too.

    There are as many as clusters once ran side by side, and each keeps the images that were the newest then. Nobody
    else can take a store while it is being removed, and one that is taken is not touched.
    """
    stores = [(path.stat().st_mtime, path) for path in folder.iterdir() if path.is_dir()]
    for used_at, store in sorted(stores):
        if now - used_at < STORE_UNUSED_S and machine.disk_used(folder) < DISK_FULL:
            continue
        if (lock := _lock_store(folder, int(store.name))) is not None:
            with lock:
                shutil.rmtree(store, ignore_errors=True)


def footprint() -> set[str]:
    """All of this machine that a cluster could leave a trace in: a test compares it before `up` and after `down`."""
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True).stdout.splitlines()
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout.splitlines()
    routes = subprocess.run(["ip", "route"], capture_output=True, text=True).stdout.splitlines()
    sysctls = ("net/ipv4/ip_forward", "vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")
    return {
        *(f"rule {line}" for line in rules if line.startswith("-")),
        *(f"link {line.split(': ')[1]}" for line in links),
        *(f"route {line}" for line in routes),
        *(f"mount {line.split()[4]}" for line in _mounts()),
        *(f"cgroup {path}" for path in machine.CGROUP.glob("*/*/")),
        *(f"sysctl {name} {Path('/proc/sys', name).read_text().strip()}" for name in sysctls),
    }


def problems(*, images_wanted: bool = False) -> list[machine.Problem]:
    """What keeps a cluster from running here, with what it has in the cache taken into account."""
    unbuilt = not all(programs.is_built(name) for name in programs.NEEDED)
    unmade = images_wanted and not images.has_any()
    needed_bytes = 2**30 + (BUILD_BYTES if unbuilt else 0) + (IMAGE_BYTES if unmade else 0)
    return machine.check(go_needed=unbuilt, disk_needed_bytes=needed_bytes)


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"


def _start_time(pid: int) -> str:
    # Field 22 of stat; the name in field 2 may hold spaces and brackets.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _read_pid(file: Path) -> tuple[int, str]:
    pid, start_time = file.read_text().split()
    return int(pid), start_time


def _is_alive(pid: int, start_time: str) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return stat[0] != "Z" and stat[19] == start_time


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    name = os.environ.get("OCTAVO_CLUSTER_NAME", "dev")
    parser.add_argument("--name", default=name, help=f"which cluster (default: {name})")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    add("check", "say what keeps a cluster from running here").add_argument("--json", action="store_true")
    add("install", "install the Debian packages that are missing")
    build = add("build", "build the cluster's programs into the cache")
    choice = f"of {' '.join(programs.COMPONENTS)} {definitions.NAME} (default: {' '.join(programs.FOR_DEMO)})"
    build.add_argument("components", nargs="*", metavar="component", help=choice)
    add("base", "make or pull the images' base, python:3.12-slim-bookworm")
    image = add("image", "build the project's images")
    image.add_argument("targets", nargs="*", metavar="target", help=f"default: {' '.join(images.TARGETS)}")
    measured = add("sizes", "print the size of each layer of the built images")
    measured.add_argument("targets", nargs="*", metavar="target", help=f"default: {' '.join(images.TARGETS)}")
    add("load", "bring built images into the running cluster").add_argument("images", nargs="+", metavar="image")
    up = add("up", "start the cluster")
    up.add_argument("--gpus", type=int, default=0, help="make-believe nvidia.com/gpu devices on the node (default: 0)")
    up.add_argument("--kwok", action="store_true", help="manage fake nodes, see start_kwok")
    up.add_argument("--images", nargs="*", default=[], metavar="image", help="built images to load")
    add("down", "stop the cluster and remove everything of it but its image store")
    run = add("in", "run a command inside the cluster's namespaces")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="command")
    add("kubeconfig", "print the path of a kubeconfig that works from this machine")
    forward = add("forward", "make an address of the cluster's network reachable on 127.0.0.1, until `down`")
    forward.add_argument("target", metavar="host:port")
    forward.add_argument("port", type=int, nargs="?", default=0, help="port on this machine (default: a free one)")
    logs = add("logs", "print a program's log, or say which there are")
    logs.add_argument("program", nargs="?")
    add("status", "say what runs")
    add("prometheus", "start Prometheus inside and print its URL")
    arguments = parser.parse_args()
    try:
        return _command(Cluster(arguments.name), arguments)
    except (ClusterError, images.ImageError) as error:
        say(f"error: {error}")
    except subprocess.CalledProcessError as error:
        say(f"error: {' '.join(map(str, error.cmd))} exited with {error.returncode}")
    return 1


def _command(cluster: Cluster, arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "check":
            found = problems(images_wanted=True)
            if arguments.json:
                print(json.dumps([vars(problem) for problem in found], indent=2))
            else:
                print("\n".join(map(str, found)) or "This machine can carry the cluster.")
            return 1 if found else 0
        case "install":
            if missing := machine.install():
                say(f"These packages are missing: {' '.join(missing)}")
                return 1
        case "build":
            components = tuple(name for name in arguments.components if name != definitions.NAME)
            if definitions.NAME in arguments.components:
                definitions.fetch(say)
            else:
                components = components or programs.FOR_DEMO
            if unknown := set(components) - set(programs.COMPONENTS):
                there_are = " ".join(programs.COMPONENTS)
                raise ClusterError(f"no such component: {' '.join(sorted(unknown))}; there are {there_are}")
            programs.build(components, say)
        case "base":
            images.ensure_base(say)
        case "image":
            for target in arguments.targets or images.TARGETS:
                images.build(target, say)
        case "sizes":
            for target in arguments.targets or images.TARGETS:
                print(sizes.table(images.name_of(target)))
        case "load":
            for image in arguments.images:
                cluster.load(image, say)
        case "up":
            programs.build(programs.NEEDED + (("kwok",) if arguments.kwok else ()), say)
            seconds = cluster.up(gpus=arguments.gpus, kwok=arguments.kwok)
            for image in arguments.images:
                cluster.load(image, say)
            say(f"cluster {cluster.name} is up after {seconds:.1f} s; export KUBECONFIG={cluster.kubeconfig}")
        case "down":
            cluster.down()
        case "in":
            command = cluster.inside(arguments.words or ["bash"])
            os.execvp(command[0], command)
        case "kubeconfig":
            if not cluster.is_up():
                raise ClusterError(f"cluster {cluster.name} is not up")
            print(cluster.kubeconfig)
        case "forward":
            print(f"127.0.0.1:{cluster.forward(arguments.target, arguments.port)}")
        case "logs":
            _print_log(cluster, arguments.program)
        case "status":
            return _print_status(cluster)
        case "prometheus":
            programs.build(("prometheus",), say)
            print(cluster.start_prometheus())
    return 0


def _print_log(cluster: Cluster, program: str | None) -> None:
    if program is None:
        print("\n".join(sorted(path.stem for path in cluster.logs.glob("*.log"))))
        return
    file = cluster.logs / f"{program}.log"
    if not file.exists():
        raise ClusterError(f"no log of {program}; `logs` alone names those there are")
    with file.open("rb") as log:
        shutil.copyfileobj(log, sys.stdout.buffer)


def _print_status(cluster: Cluster) -> int:
    if not cluster.is_up():
        left = cluster.leftovers()
        print(f"cluster {cluster.name} is not up" + (f"; left of an earlier run: {'; '.join(left)}" if left else ""))
        return 1
    print(f"cluster {cluster.name} is up; KUBECONFIG={cluster.kubeconfig}; logs in {cluster.logs}\n")
    print(cluster.kubectl("get", "nodes,pods", "-A", "-o", "wide"))
    names = cluster.run(["ctr", "-n", "k8s.io", "images", "ls", "-q"]).stdout.split()
    print("\n".join(name for name in names if not name.startswith("sha256:")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
