# The front end: HTTP, Redis and the artifact store; no torch. From the root of the repository:
#
#   docker build -f docker/service.Dockerfile -t bathyscope-service:0.1.0 .
#
# Python and Debian are those that the tests run on. docs/containers.md says how to pin the base by digest.
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
WORKDIR /src
RUN python -m venv --without-pip /opt/bathyscope
# What changes seldom comes first: a change of the code makes the last layer anew, which is a few hundred kilobytes.
COPY pyproject.toml constraints.txt docker/requirements.py ./
RUN python requirements.py service > requirements.txt \
    && pip --python /opt/bathyscope/bin/python install --no-cache-dir --constraint constraints.txt \
        --requirement requirements.txt dumb-init
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/bathyscope/bin/python install --no-cache-dir --no-deps /wheels/*.whl

FROM ${BASE}
LABEL org.opencontainers.image.title="bathyscope-service" \
      org.opencontainers.image.description="HTTP front end of Bathyscope" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 bathyscope \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin bathyscope \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
COPY --from=build /opt/bathyscope /opt/bathyscope
# Everything that is written goes to /data and /tmp, so the root file system can be read-only.
ENV PATH=/opt/bathyscope/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    BATHYSCOPE_DATA_DIR=/data \
    BATHYSCOPE_HOST=0.0.0.0 \
    BATHYSCOPE_PORT=8000 \
    BATHYSCOPE_PACKAGED_MODEL=false
WORKDIR /data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 CMD ["bathyscope", "health", "service"]
# dumb-init is process 1: it passes signals on to its one child and reaps orphans.
ENTRYPOINT ["dumb-init", "--single-child", "--", "bathyscope"]
CMD ["service"]
