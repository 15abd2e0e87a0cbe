"""The two images as they are on the node: how large, who they run as, and what works in them."""

from __future__ import annotations

import json
from typing import Any

import demo
import images
import pytest
import sizes

from cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

# Runs in a pod as the image's own user, with a read-only root: what a pod of the restricted standard can do.
LOOK_AROUND = """
import json, os, shutil, subprocess, sys
def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return {"status": done.returncode, "out": done.stdout, "err": done.stderr}
print(json.dumps({
    "uid": os.getuid(),
    "home": os.path.expanduser("~"),
    "shells": [name for name in ("sh", "bash", "dash", "busybox") if shutil.which(name)],
    "installers": [name for name in ("pip", "pip3", "apt-get", "dpkg") if shutil.which(name)],
    "runs": {" ".join(command[:2]): run(*command) for command in json.loads(sys.argv[1])},
}))
"""
# What triton does for each new kernel signature on a GPU, which the node does not have.
COMPILE_A_LAUNCHER = """
from triton.runtime.build import compile_module_from_src
source = '''
#include <Python.h>
#include <dlfcn.h>
#include <stdbool.h>
static PyObject *answer(PyObject *self, PyObject *args) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
'''
print(compile_module_from_src(source, "launcher").answer())
"""


def look_around(cluster: Cluster, image: str, *commands: list[str]) -> dict[str, Any]:
    """Run commands in a pod of `image` and return what they said, with what the pod found around itself."""
    hardened = demo.hardened()
    hardened["securityContext"] |= {"readOnlyRootFilesystem": True}
    del hardened["securityContext"]["runAsUser"]  # the image's own must do
    container: dict[str, Any] = {
        "name": "look",
        "image": image,
        "command": ["python3", "-c", LOOK_AROUND, json.dumps(commands)],
        "env": [{"name": "TRITON_CACHE_DIR", "value": "/tmp/triton"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    volumes = [{"name": "tmp", "emptyDir": {}}]
    spec = {"restartPolicy": "Never", "containers": [container | hardened], "volumes": volumes}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "look-around"}, "spec": spec}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    try:
        succeeded = "--for=jsonpath={.status.phase}=Succeeded"
        cluster.run(["kubectl", "wait", succeeded, "pod/look-around", "--timeout=150s"], check=False, timeout_s=160)
        said = cluster.kubectl("logs", "look-around")
    finally:
        cluster.kubectl("delete", "pod", "look-around", "--grace-period=0", "--force")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def test_the_engine_image_is_torch_and_little_else(loaded_images):
    layers = sizes.layers(loaded_images["engine"])

    assert sum(layer.size_bytes for layer in layers) < 6e9, sizes.table(loaded_images["engine"])
    assert sizes.without_torch(layers) < 100e6, sizes.table(loaded_images["engine"])


def test_the_operator_image_is_small_and_holds_no_torch(loaded_images):
    layers = sizes.layers(loaded_images["operator"])

    assert sum(layer.size_bytes for layer in layers) < 150e6, sizes.table(loaded_images["operator"])
    assert not any(layer.is_torch() or layer.is_compiler() for layer in layers)


@pytest.mark.parametrize("target", ["engine", "operator"])
def test_a_change_of_our_source_makes_one_small_layer(loaded_images, target):
    layers = sizes.layers(loaded_images[target])
    ours = next(i for i, layer in enumerate(layers) if any(part.startswith("octavo_") for part in layer.parts))

    # What lies above is made anew with it: nothing here, and compiled kernels where they are asked for.
    assert sum(layer.size_bytes for layer in layers[ours:]) < 5e6


def test_a_build_leaves_no_mount(loaded_images):
    with images.locked():  # another build would have its own
        assert images.mounts() == []


def test_the_engine_image_serves_plans_and_compiles_without_a_shell(cluster, loaded_images):
    compiles = ["python3", "-c", COMPILE_A_LAUNCHER]
    commands = (["octavo", "--version"], ["octavo", "serve", "--help"], ["octavo", "plan", "/nowhere"], compiles)
    found = look_around(cluster, loaded_images["engine"], *commands)
    runs = found["runs"]

    assert (found["uid"], found["home"]) == (10001, "/home/octavo")
    assert found["shells"] == []
    assert found["installers"] == []
    assert runs["octavo --version"]["status"] == 0
    assert "--max-model-len" in runs["octavo serve"]["out"]
    assert runs["octavo plan"]["status"] != 0
    assert "/nowhere" in runs["octavo plan"]["err"] + runs["octavo plan"]["out"]
    assert runs["python3 -c"] == {"status": 0, "out": "42\n", "err": ""}


def test_the_operator_image_prints_its_crd_without_a_shell(cluster, loaded_images):
    found = look_around(cluster, loaded_images["operator"], ["octavo-operator", "crd"], ["octavo-operator", "--help"])
    runs = found["runs"]

    assert (found["uid"], found["shells"], found["installers"]) == (10001, [], [])
    assert runs["octavo-operator crd"]["status"] == 0, runs["octavo-operator crd"]["err"]
    assert "kind: CustomResourceDefinition" in runs["octavo-operator crd"]["out"]
    assert "render" in runs["octavo-operator --help"]["out"]
