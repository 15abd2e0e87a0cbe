# Two images from one file: `--target operator` and `--target engine`.
#
# Both end on a root file system of their own: CPython, the shared libraries that it is linked with, and Python
# packages. No shell, no package manager, no pip. Layers are ordered by how often they change, so that a change of our
# source makes one layer of a megabyte and leaves the others, torch's gigabytes among them, as they are.

FROM python:3.12-slim AS tools
ENV PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_PROGRESS_BAR=off PIP_NO_WARN_SCRIPT_LOCATION=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev binutils \
    && rm -rf /var/lib/apt/lists/*
RUN pip install hatchling==1.33.0

# The root that both images stand on.
FROM tools AS root
WORKDIR /rootfs
RUN set -eu; libraries=usr/lib/$(uname -m)-linux-gnu; \
    mkdir -p usr/bin usr/sbin $libraries usr/lib64 usr/local/lib etc/ssl/certs proc sys dev run; \
    ln -s usr/bin bin; ln -s usr/sbin sbin; ln -s usr/lib lib; ln -s usr/lib64 lib64; \
    install -d -m 1777 tmp var/tmp; \
    # The standard library without its tests, the desktop parts and what installs packages.
    tar -C /usr/local -cf - --exclude=__pycache__ --exclude=test --exclude=tests --exclude=idlelib --exclude=tkinter \
        --exclude=turtledemo --exclude=turtle.py --exclude=lib2to3 --exclude=ensurepip --exclude=pydoc_data \
        --exclude='config-3*' --exclude='*-packages/*' --exclude='_tkinter*' --exclude='_test*' --exclude='*.a' \
        bin/python3.12 bin/python3 bin/python lib/python3.12 \
        $(cd /usr/local && ls -d lib/libpython3*.so* 2>/dev/null || true) | tar -C usr/local -xf -; \
    mkdir -p usr/local/lib/python3.12/site-packages; \
    # Compiled here, as nobody can write it later; unchecked, as nobody can change the source later.
    python3 -m compileall -q -s /rootfs --invalidation-mode unchecked-hash usr/local/lib/python3.12; \
    # Every library that CPython and its modules ask for, and those that a wheel for Linux may take for granted.
    { find usr/local -type f \( -name '*.so*' -o -name python3.12 \) -exec ldd {} + | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p'; \
      for name in libstdc++.so.6 libgcc_s.so.1 libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libutil.so.1 \
          libresolv.so.2 libz.so.1 libnss_dns.so.2 libnss_files.so.2; do find /usr/lib/*-linux-gnu -name $name; done; \
    } | grep -v /usr/local | sort -u | while read -r library; do cp -nL $library $libraries/; done; \
    for loader in /lib64/ld-linux-*.so.* /lib/ld-linux-*.so.*; do [ ! -e $loader ] || cp -L $loader .$loader; done; \
    # Container runtimes and triton look for the GPU driver's library with ldconfig.
    cp /sbin/ldconfig usr/sbin/; cp -r /etc/ld.so.conf /etc/ld.so.conf.d /etc/os-release etc/; ldconfig -r .; \
    cp -L /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/; \
    printf 'root:x:0:0:root:/root:/sbin/nologin\noctavo:x:10001:10001:Octavo:/home/octavo:/sbin/nologin\n' > etc/passwd; \
    printf 'root:x:0:\noctavo:x:10001:\n' > etc/group; \
    printf 'hosts: files dns\n' > etc/nsswitch.conf; \
    mkdir /empty

# pyproject.toml changes for many reasons: these files keep the layers below while their own content stays the same.
FROM tools AS requirements
COPY pyproject.toml /
RUN python3 -c "import tomllib; \
extras = tomllib.load(open('/pyproject.toml', 'rb'))['project']['optional-dependencies']; \
extras['torch'] = [line for line in extras['engine'] if line.startswith('torch=')]; \
[open(f'/{name}.txt', 'w').write('\n'.join(sorted(extras[name]))) for name in ('torch', 'engine', 'operator')]"

FROM tools AS operator-packages
COPY --from=requirements /operator.txt /
RUN pip install --prefix=/packages -r /operator.txt \
    # The operator uses kubernetes.aio. Its older twin loads these classes by name only, and nothing names them.
    && find /packages/lib/python3.12/site-packages/kubernetes/client/api \
            /packages/lib/python3.12/site-packages/kubernetes/client/models -name '*.py' ! -name __init__.py -delete \
    && find /packages -name '*_test.py' -path '*/kubernetes/*' -delete \
    && find /packages -name '*.so' -exec strip --strip-unneeded {} + \
    # kubernetes.aio's typed classes are there for whoever wants them, but only what is imported gets compiled.
    && python3 -m compileall -q -s /packages -p /usr/local --invalidation-mode unchecked-hash \
        -x 'kubernetes/aio/client/(api|models)/' /packages/lib/python3.12/site-packages

# Our own source, without its dependencies: the operator reads the engine's flags and plan, the engine knows no operator.
FROM tools AS source
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY operator operator
RUN pip install -q --no-deps --no-index --no-build-isolation --prefix=/operator . \
    && python3 -m compileall -q -s /operator -p /usr/local --invalidation-mode unchecked-hash /operator/lib/python3.12 \
    && cp -r /operator /engine \
    && rm -r /operator/bin/octavo /engine/bin/octavo-operator /engine/lib/python3.12/site-packages/octavo_operator

FROM scratch AS operator
COPY --from=root /rootfs /
COPY --from=root --chown=10001:10001 /empty /home/octavo
COPY --from=operator-packages /packages /usr/local
COPY --from=source /operator /usr/local
ENV PATH=/usr/local/bin:/usr/bin:/usr/sbin HOME=/home/octavo LANG=C.UTF-8 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/octavo
EXPOSE 8080
ENTRYPOINT ["octavo-operator"]
CMD ["run"]

FROM tools AS torch
COPY --from=requirements /torch.txt /
# Its C++ headers and tools are for extensions that we do not build; it asks for one helper of its own by name.
RUN pip install --prefix=/torch -r /torch.txt \
    && cd /torch/lib/python3.12/site-packages \
    && rm -rf torch/include torch/share triton/FileCheck triton/backends/amd/lib nvidia/*/include nvidia/*/lib/*.a \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && python3 -m compileall -q -j 0 -s /torch -p /usr/local --invalidation-mode unchecked-hash .

FROM torch AS engine-packages
COPY --from=requirements /engine.txt /
RUN PYTHONPATH=/torch/lib/python3.12/site-packages pip install --prefix=/packages -r /engine.txt \
    && find /packages -name '*.so' -exec strip --strip-unneeded {} + \
    && python3 -m compileall -q -s /packages -p /usr/local --invalidation-mode unchecked-hash /packages/lib/python3.12

# triton compiles a launcher for each new kernel signature: a C compiler, with nothing of it that C does not need.
FROM tools AS compiler
WORKDIR /rootfs
RUN set -eu; arch=$(uname -m)-linux-gnu; \
    dpkg -L $(dpkg-query -W -f '${Package}\n' | grep -E '^(gcc|cpp|binutils|libgcc-[0-9]+-dev|libc6-dev|linux-libc-dev)') \
        | grep -E "^/usr/(bin/($arch-)?(gcc|gcc-[0-9]+|as|ld|ld.bfd)\$|include/|lib/gcc/|lib/$arch/(crt[1in]\.o|libc\.so|libc_nonshared\.a|libm\.so|libmvec\.so))" \
        | grep -vE '/(lto1|g-?cov[^/]*|lib[a-z]*san[^/]*|lib(gcov|gomp|itm|quadmath|atomic)[^/]*|plugin)(/|$)|/include/(drm|rdma|scsi|sound|video|xen|misc|mtd|c\+\+)/' \
        | while read -r file; do [ -d "$file" ] && [ ! -L "$file" ] || cp --parents -P "$file" .; done; \
    mkdir -p usr/lib/$arch usr/local/include; cp -r /usr/local/include/python3.12 usr/local/include/; \
    find usr/bin usr/lib/gcc -type f -perm /111 -exec ldd {} + 2>/dev/null | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | sort -u \
        | while read -r library; do cp -nL $library usr/lib/$arch/; done; \
    rm -f usr/lib/$arch/libc.so.6 usr/lib/$arch/libm.so.6

FROM scratch AS engine
COPY --from=root /rootfs /
COPY --from=compiler /rootfs /
COPY --from=root --chown=10001:10001 /empty /home/octavo
COPY --from=root --chown=10001:10001 /empty /var/cache/octavo/triton
COPY --from=torch /torch /usr/local
COPY --from=engine-packages /packages /usr/local
COPY --from=source /engine /usr/local
ENV PATH=/usr/local/bin:/usr/bin:/usr/sbin HOME=/home/octavo LANG=C.UTF-8 PYTHONUNBUFFERED=1 \
    TRITON_CACHE_DIR=/var/cache/octavo/triton NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONWARNINGS="ignore:Failed to initialize NumPy:UserWarning"
USER 10001:10001
WORKDIR /home/octavo
EXPOSE 8000 8001
HEALTHCHECK --start-period=10s CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8001/livez', timeout=5)"]
ENTRYPOINT ["octavo"]
CMD ["serve"]
