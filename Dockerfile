# An image that trains. On CPUs:
#
#   docker build -t distrain . && docker run --rm distrain
#
# On GPUs, with torch from PyPI, which brings its own CUDA libraries (BASE is free, too: any Debian
# or Ubuntu whose python3 is 3.11 or newer, such as nvidia/cuda:13.0.1-base-ubuntu24.04):
#
#   docker build -t distrain --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD/runs:/work/runs" distrain
#
# The root file system may be read-only (--read-only --tmpfs /tmp, Apptainer, Pyxis): runs/ of the
# current folder, /work, is all that is written.
# An index or a certificate of yours: --secret id=pip.conf,src=... ; it stays out of the image.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# what is changed rarely comes first: python, then the dependencies, then the source
RUN python3 -c 'import ensurepip' 2>/dev/null || { apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*; } \
    && python3 -m venv /opt/venv
# a home and a current folder that any --user may write to
RUN useradd --uid 10001 --home-dir /work --no-create-home trainer && mkdir -m 1777 /work
ENV PATH=/opt/venv/bin:$PATH HOME=/work PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/distrain
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip.conf export PIP_CONFIG_FILE=/run/secrets/pip.conf \
    && python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], sep="\n")' >/tmp/dependencies \
    && pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r /tmp/dependencies \
    && rm /tmp/dependencies

COPY README.md ./
COPY conf conf
COPY launch launch
COPY distrain distrain
RUN --mount=type=secret,id=pip.conf PIP_CONFIG_FILE=/run/secrets/pip.conf pip install --no-deps . \
    && rm -rf build *.egg-info

USER 10001
WORKDIR /work
# the smoke test: two ranks read handwritten digits
CMD ["python", "-m", "distrain", "+experiment=digits", "launch.ranks=2"]
