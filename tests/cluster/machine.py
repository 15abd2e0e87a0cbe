"""Say whether this machine can carry the cluster, and install what it lacks. Called by cluster.py and by the demo.

The cluster needs root, namespaces of its own, version 1 cgroups, some Debian packages, Go for what is not built yet,
and room on the disk. Each thing missing is a `Problem`: one sentence says what is wrong, one what to do.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Debian package -> a command or file that shows it is there.
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ethtool": "ethtool",
    "buildah": "buildah",
    "skopeo": "skopeo",
    "mmdebstrap": "mmdebstrap",
    "gcc": "gcc",
    "libc6-dev": "/usr/include/stdio.h",
    "binutils": "strip",
    "openssl": "openssl",
    "iproute2": "ip",
    "util-linux": "nsenter",
    "procps": "ps",
    "ca-certificates": "/etc/ssl/certs/ca-certificates.crt",
    "curl": "curl",
}
CGROUP = Path("/sys/fs/cgroup")
CGROUP_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "devices", "freezer")
ELSEWHERE = "use a cluster that you have (CLUSTER=current make demo), or a machine or virtual machine of its own"

# Everything that start.sh does to the kernel, tried in namespaces that end with the try.
PROBE = """
set -e
mount --make-rshared /
mount -t tmpfs tmpfs /run
ip link set lo up
ip link add node0 type bridge
ip link add veth0 type veth peer name veth1
echo 1 > /proc/sys/net/ipv4/ip_forward
iptables -t nat -A POSTROUTING -j MASQUERADE
mkdir -p /run/a /run/b /run/c /run/d
mount -t overlay overlay -o lowerdir=/run/a,upperdir=/run/b,workdir=/run/c /run/d
"""


@dataclass(frozen=True)
class Problem:
    code: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.message} {self.fix}"


def disk_used(folder: Path) -> float:
    """Share of the folder's disk, as df reckons it: room that is kept from us counts neither as used nor as free."""
    found = os.statvfs(folder)
    used = found.f_blocks - found.f_bfree
    return used / (used + found.f_bavail)


def cache_dir() -> Path:
    """Where downloads, programs, images and running clusters live; never in the checkout."""
    if octavo := os.environ.get("OCTAVO_CACHE"):
        return Path(octavo).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make` fill a folder of the cache, unless it is there: one process at a time, the others find it made.

    It is filled beside its place and moved when it is whole. What an interrupted one left is removed by the next.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        make(partial)
        partial.rename(folder)


def missing_packages() -> list[str]:
    return [
        package
        for package, sign in PACKAGES.items()
        if not (Path(sign).exists() if sign.startswith("/") else shutil.which(sign))
    ]


def check(*, go_needed: bool, disk_needed_bytes: int) -> list[Problem]:
    """All that is missing, in the order in which a person would fix it. Empty when the cluster can run."""
    system, processor = platform.system(), platform.machine()
    if system != "Linux" or processor not in ("x86_64", "aarch64"):
        message = f"The cluster needs Linux on x86_64 or aarch64, and this is {system} on {processor}."
        return [Problem("platform", message, f"Instead, {ELSEWHERE}.")]
    problems = []

    def missing(code: str, message: str, fix: str) -> None:
        problems.append(Problem(code, message, fix))

    is_root = os.geteuid() == 0
    if not is_root:
        missing(
            "root", "Containers need root, and this is an ordinary user.", f"Run it as root (sudo), or {ELSEWHERE}."
        )
    if (CGROUP / "cgroup.controllers").exists():
        message = "This machine has version 2 cgroups, which the cluster does not support yet."
        missing("cgroup", message, f"Boot with systemd.unified_cgroup_hierarchy=0, or {ELSEWHERE}.")
    elif absent := [name for name in CGROUP_CONTROLLERS if not (CGROUP / name).is_dir()]:
        message = f"These cgroup hierarchies are not mounted under {CGROUP}: {', '.join(absent)}."
        missing("cgroup", message, f"Mount them, or {ELSEWHERE}.")
    elif is_root and not os.access(CGROUP / "memory", os.W_OK):
        missing("cgroup", f"{CGROUP} is read-only here.", f"Run outside this container, or {ELSEWHERE}.")
    if packages := missing_packages():
        fix = f"Run: apt-get install --no-install-recommends {' '.join(packages)}"
        if not shutil.which("apt-get"):
            fix = "Install what your distribution calls them."
        elif is_root:
            fix = "Run: python tests/cluster/cluster.py install"
        missing("packages", f"These Debian packages are missing: {' '.join(packages)}.", fix)
    elif is_root and (refusal := _probe()):
        message = f"The kernel refuses what the cluster does in namespaces of its own: {refusal}."
        missing("namespaces", message, f"Allow it (a container needs --privileged), or {ELSEWHERE}.")
    if go_needed and not shutil.which("go"):
        message = "Kubernetes has to be built once, and there is no Go on this machine."
        missing("go", message, "Install Go 1.21 or later (https://go.dev/dl) and see that `go` is on the PATH.")
    free = shutil.disk_usage(_existing(cache_dir())).free
    if free < disk_needed_bytes:
        need, have = disk_needed_bytes / 2**30, free / 2**30
        message = f"The cache at {cache_dir()} needs about {need:.0f} GB more, and {have:.0f} GB are free."
        missing("disk", message, "Free some, or set OCTAVO_CACHE to a folder on another disk.")
    return problems


def install() -> list[str]:
    """Install the missing Debian packages. What is still missing afterwards comes back."""
    missing = missing_packages()
    if not missing or os.geteuid() != 0 or not shutil.which("apt-get"):
        return missing
    apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run([*apt, "update"], env=env, check=True)
    packages = [*apt, "install", "-y", "--no-install-recommends", *missing]
    subprocess.run(packages, env=env, check=True, stdout=subprocess.DEVNULL)
    return missing_packages()


def _probe() -> str:
    """The kernel's refusal, or an empty string when it does all that is asked."""
    unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    tried = subprocess.run([*unshare, "sh", "-c", PROBE], capture_output=True, text=True)
    return "" if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["no reason given"])[-1]


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
