# The worker: supervisor and engines. From the root of the repository, for NVIDIA GPUs and for CPUs:
#
#   docker build -f docker/worker.Dockerfile -t bathyscope-worker:0.1.0-cu130 .
#   docker build -f docker/worker.Dockerfile -t bathyscope-worker:0.1.0-cpu --build-arg TORCH=cpu .
#
# torch's CUDA wheels bring every CUDA library they were tested with, and the driver comes from the host by NVIDIA's
# container toolkit. So both variants stand on the Python that the tests run on, and share its layers with the service.
ARG BASE=python:3.11.15-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt hatchling
COPY README.md LICENSE ./
COPY clients clients
COPY service service
COPY workers workers
RUN pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels .

FROM ${BASE} AS build
# cu130 needs a driver of the 580 series or later; cu126 and cu129 serve older ones.
ARG TORCH=cu130
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl
WORKDIR /src
# What changes seldom comes first: torch, then the other packages, then the code. The local version (+cu130, +cpu) is
# asked for by name, so that no other build of torch is taken in silence.
RUN python -m venv --without-pip /opt/bathyscope \
    && pip --python /opt/bathyscope/bin/python install --no-cache-dir \
        --extra-index-url "${TORCH_INDEX}/${TORCH}" "torch==${TORCH_VERSION}+${TORCH}"
COPY pyproject.toml constraints.txt docker/requirements.py ./
RUN python requirements.py worker > requirements.txt \
    && pip --python /opt/bathyscope/bin/python install --no-cache-dir --constraint constraints.txt \
        --requirement requirements.txt dumb-init
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/bathyscope/bin/python install --no-cache-dir --no-deps /wheels/*.whl

FROM ${BASE}
LABEL org.opencontainers.image.title="bathyscope-worker" \
      org.opencontainers.image.description="Worker of Bathyscope: models, extraction, probes" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 bathyscope \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin bathyscope \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
COPY --from=build /opt/bathyscope /opt/bathyscope
# Everything that is written goes to /data and /tmp, so the root file system can be read-only. Which GPUs a container
# sees is left to whoever starts it.
ENV PATH=/opt/bathyscope/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    HF_HOME=/data/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    BATHYSCOPE_DATA_DIR=/data \
    BATHYSCOPE_PACKAGED_MODEL=false
WORKDIR /data
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 CMD ["bathyscope", "health", "worker"]
# dumb-init is process 1: it passes signals on to its one child, so that the supervisor drains and not each engine by
# itself, and reaps what an engine that was killed leaves behind.
ENTRYPOINT ["dumb-init", "--single-child", "--", "bathyscope"]
CMD ["worker"]
