#!/bin/bash
# rootfs.sh: collect in the current folder the root that both images stand on. Run by the Dockerfile.
# CPython, the shared libraries that it and any wheel for Linux ask for, and the few files that C libraries read.
set -eu
LIBRARIES=usr/lib/$(uname -m)-linux-gnu
mkdir -p usr/bin usr/sbin "$LIBRARIES" usr/lib64 usr/local/lib etc/ssl/certs proc sys dev run
ln -s usr/bin bin
ln -s usr/sbin sbin
ln -s usr/lib lib
ln -s usr/lib64 lib64
install -d -m 1777 tmp var/tmp

# The standard library without its tests, the desktop parts, what installs packages, and nis, which asks for Kerberos.
# It is compiled here, as nobody can write it later, and unchecked, as nobody can change its source later.
tar -C /usr/local -cf - --exclude=__pycache__ --exclude=test --exclude=tests --exclude=idlelib --exclude=tkinter \
  --exclude=turtledemo --exclude=turtle.py --exclude=lib2to3 --exclude=ensurepip --exclude=pydoc_data \
  --exclude='config-3*' --exclude='*-packages/*' --exclude='_tkinter*' --exclude='_test*' --exclude='nis.*' --exclude='*.a' \
  bin/python3.12 bin/python3 bin/python lib/python3.12 \
  $(cd /usr/local && ls -d lib/libpython3*.so* 2>/dev/null || true) | tar -C usr/local -xf -
mkdir -p usr/local/lib/python3.12/site-packages
python3 -m compileall -q -s "$PWD" --invalidation-mode unchecked-hash usr/local/lib/python3.12

{ find usr/local -type f \( -name '*.so*' -o -name python3.12 \) -exec ldd {} + | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p'
  for name in libstdc++.so.6 libgcc_s.so.1 libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libutil.so.1 \
    libresolv.so.2 libz.so.1 libnss_dns.so.2 libnss_files.so.2; do
    find /usr/lib/*-linux-gnu -name $name
  done; } | grep -v /usr/local | sort -u | while read -r library; do cp -nL "$library" "$LIBRARIES/"; done
for loader in /lib64/ld-linux-*.so.* /lib/ld-linux-*.so.*; do [ ! -e "$loader" ] || cp -L "$loader" ".$loader"; done

# Container runtimes and triton look for the GPU driver's library with ldconfig.
cp /sbin/ldconfig usr/sbin/
cp -r /etc/ld.so.conf /etc/ld.so.conf.d /etc/os-release etc/
ldconfig -r .
cp -L /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/
printf 'root:x:0:0:root:/root:/sbin/nologin\noctavo:x:10001:10001:Octavo:/home/octavo:/sbin/nologin\n' > etc/passwd
printf 'root:x:0:\noctavo:x:10001:\n' > etc/group
printf 'hosts: files dns\n' > etc/nsswitch.conf
