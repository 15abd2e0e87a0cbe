#!/bin/bash
# base.sh PYTHON IMAGE: make what python:3.12-slim-bookworm is, from Debian packages and a CPython 3.12 of this machine,
# for machines that reach no container registry. BUILDAH is buildah's command line.
set -eu
PYTHON=$1 IMAGE=$2
PREFIX=$("$PYTHON" -c 'import sys; print(sys.base_prefix)')
VERSION=$("$PYTHON" -c 'import platform; print(platform.python_version())')
SERIES=${VERSION%.*}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

echo "STEP: copy CPython $VERSION"
LOCAL=$WORK/python/usr/local
mkdir -p "$LOCAL/bin" "$LOCAL/lib"
( cd "$PREFIX"; tar -cf - --exclude=__pycache__ --exclude=test --exclude=tests --exclude=idlelib --exclude=tkinter \
    --exclude=turtledemo --exclude='*-packages/*' --exclude='_tkinter*' --exclude='*.a' \
    "lib/python$SERIES" "include/python$SERIES" "bin/python$SERIES" $(ls -d lib/libpython*.so* 2>/dev/null || true) ) |
  tar -C "$LOCAL" -xf -
find "$LOCAL" -name '*.so*' -type f -exec strip --strip-unneeded {} +
ln -s "python$SERIES" "$LOCAL/bin/python3"
ln -s "python$SERIES" "$LOCAL/bin/python"

echo "STEP: install a minimal Debian"
# The libraries that CPython's own extension modules are linked with, and what the published image holds besides.
mmdebstrap --quiet --variant=minbase \
  --include=ca-certificates,netbase,tzdata,libssl3,libffi8,libbz2-1.0,liblzma5,libreadline8,libsqlite3-0,zlib1g,libncursesw6,libuuid1,libcrypt1,libnsl2,libtirpc3 \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$WORK/root.tar"

echo "STEP: commit $IMAGE"
c=$($BUILDAH from scratch)
$BUILDAH add -q "$c" "$WORK/root.tar" /
$BUILDAH add -q "$c" "$WORK/python" /
$BUILDAH config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 \
  --env PYTHON_VERSION="$VERSION" --cmd python3 "$c"
$BUILDAH run --isolation chroot "$c" sh -c 'ldconfig && python3 -m ensurepip >/dev/null && ln -sf pip3 /usr/local/bin/pip'
$BUILDAH commit -q --rm "$c" "$IMAGE"
