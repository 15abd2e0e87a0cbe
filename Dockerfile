# Two images from one file: `--target operator` and `--target engine`.
#
# Both end on a root file system of their own: CPython, the shared libraries that it is linked with, and Python
# packages. No shell, no package manager, no pip. Layers are ordered by how often they change, so that a change of our
# source makes one layer of a megabyte and leaves the others, torch's gigabytes among them, as they are.

FROM python:3.12-slim-bookworm AS tools
ENV PIP_NO_CACHE_DIR=1 PIP_COMPILE=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_PROGRESS_BAR=off PIP_NO_WARN_SCRIPT_LOCATION=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev binutils \
    && rm -rf /var/lib/apt/lists/*
RUN pip install hatchling==1.33.0

FROM tools AS root
COPY docker/rootfs.sh /
WORKDIR /rootfs
RUN bash /rootfs.sh && mkdir /empty

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
    # The client loads its 60 MB of typed classes by name, and the operator, which uses the dynamic client, names none.
    && find /packages/lib/python3.12/site-packages/kubernetes \( -path '*/client/api/*' -o -path '*/client/models/*' \) \
            -type f ! -name __init__.py -delete \
    && find /packages -name '*_test.py' -path '*/kubernetes/*' -delete \
    && find /packages -name '*.so' -exec strip --strip-unneeded {} + \
    && python3 -m compileall -q -s /packages -p /usr/local --invalidation-mode unchecked-hash \
        /packages/lib/python3.12/site-packages

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

FROM tools AS compiler
COPY docker/compiler.sh /
WORKDIR /rootfs
RUN bash /compiler.sh

FROM scratch AS engine
COPY --from=root /rootfs /
COPY --from=compiler /rootfs /
COPY --from=root --chown=10001:10001 /empty /home/octavo
COPY --from=root --chown=10001:10001 /empty /var/cache/octavo/triton
ENV PATH=/usr/local/bin:/usr/bin:/usr/sbin HOME=/home/octavo LANG=C.UTF-8 PYTHONUNBUFFERED=1 \
    TRITON_CACHE_DIR=/var/cache/octavo/triton NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONWARNINGS="ignore:Failed to initialize NumPy:UserWarning" OCTAVO_HOST=0.0.0.0
# Installed in place: copying torch's gigabytes from another stage would take longer, and comparing them at each build.
# pip is lent by another stage, so it is not in the image. The lists of requirements decide whether these layers are new.
COPY docker/install.py /usr/local/share/octavo/
COPY --from=requirements /torch.txt /usr/local/share/octavo/
RUN --mount=type=bind,from=tools,target=/tools \
    ["python3", "/usr/local/share/octavo/install.py", "/tools", "/usr/local/share/octavo/torch.txt"]
COPY --from=requirements /engine.txt /usr/local/share/octavo/
RUN --mount=type=bind,from=tools,target=/tools \
    ["python3", "/usr/local/share/octavo/install.py", "/tools", "/usr/local/share/octavo/engine.txt"]
COPY --from=source /engine /usr/local
# A pod whose kernels are here is ready in six seconds; others compile them first, on all their cores. Names are folders of
# docker/models; 6 MB for each and each architecture (A100: sm_80, L4 and L40S: sm_89, H100 and H200: sm_90).
ARG KERNELS="llama-3.1-8b" ARCHITECTURES="sm_80 sm_89 sm_90"
COPY docker/models /usr/local/share/octavo/models
RUN --mount=type=bind,source=docker/kernels.py,target=/kernels.py ["python3", "/kernels.py"]
ENV OCTAVO_PREBUILT_KERNELS=/usr/local/share/octavo/kernels
USER 10001:10001
WORKDIR /home/octavo
EXPOSE 8000 8001
HEALTHCHECK --start-period=10s CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8001/livez', timeout=5)"]
ENTRYPOINT ["octavo"]
CMD ["serve"]
