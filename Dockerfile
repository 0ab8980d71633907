# A worker for Beam's runners, with this package, its dependencies as in requirements.lock, and a model.
#
#   docker build -t clapsep .                        Flink, Kubernetes: not as root
#   docker build -t clapsep --target dataflow .      Dataflow, and the launcher of its Flex Template
#
#   --build-arg BASE=ubuntu:24.04 --build-arg UV_TORCH_BACKEND=cpu      without CUDA, and smaller
#   --build-arg BUNDLE=folder                        a model to bake in, beside the embedded default
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ghcr.io/astral-sh/uv:0.13.9 AS uv
FROM apache/beam_python3.11_sdk:2.77.0 AS beam
FROM gcr.io/dataflow-templates-base/python311-template-launcher-base:20240812-rc01 AS launcher

FROM ${BASE} AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_NO_CACHE=1
ARG UV_TORCH_BACKEND
WORKDIR /src
RUN uv venv --python 3.11 /opt/venv
COPY requirements.lock pyproject.toml setup.py README.md ./
# Beam's boot program installs what a run sends along by pip, which needs setuptools in place.
RUN uv pip install --python /opt/venv --constraint requirements.lock \
    --requirements setup.py --extra gcp --extra s3 setuptools pip==26.2.1
COPY LICENSE NOTICE ./
COPY clapsep clapsep
COPY pipelines pipelines
RUN uv pip install --python /opt/venv --no-deps --no-build-isolation .
# Where workers look before they fetch a remote model of the same digest.
ARG BUNDLE=clapsep/bundles/mini
COPY ${BUNDLE} bundle
RUN digest="$(/opt/venv/bin/python -c 'from clapsep import bundle; print(bundle.verify("bundle").digest)')" \
    && mkdir -p /opt/bundles && mv bundle "/opt/bundles/$digest"

FROM ${BASE} AS worker
RUN useradd --create-home --uid 10001 clapsep
COPY --from=beam /opt/apache/beam /opt/apache/beam
COPY --from=build /opt/python /opt/python
COPY --from=build --chown=10001 /opt/venv /opt/venv
COPY --from=build --chown=10001 /opt/bundles /opt/bundles
# Dataflow mounts the GPU's driver at /usr/local/nvidia. The base image has no certificates of its own.
ENV PATH=/opt/venv/bin:$PATH \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    SSL_CERT_FILE=/opt/venv/lib/python3.11/site-packages/certifi/cacert.pem \
    CLAPSEP_CACHE=/opt/bundles \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
USER 10001
WORKDIR /home/clapsep
ENTRYPOINT ["/opt/apache/beam/boot"]

# Dataflow mounts folders that only root can write, and so does the launcher of its templates:
# github.com/pangeo-data/pangeo-docker-images/pull/360, GoogleCloudPlatform/python-docs-samples/issues/13213.
FROM worker AS dataflow
# hadolint ignore=DL3002
USER 0
COPY --from=launcher /opt/google/dataflow/python_template_launcher /opt/google/dataflow/python_template_launcher
RUN printf 'import sys\nfrom pipelines.separate import main\nsys.exit(main())\n' > /opt/launch.py
ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/launch.py

# What is built where no target is named.
FROM worker
