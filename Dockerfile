# An image that trains: docker build -t distrain . && docker run --rm distrain
# For GPUs: --build-arg BASE=nvidia/cuda:12.6.3-runtime-ubuntu24.04 (its python3 must be 3.11 or newer)
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
RUN useradd --create-home trainer
WORKDIR /opt/distrain
COPY pyproject.toml constraints.txt README.md ./
COPY conf conf
COPY launch launch
COPY distrain distrain
RUN python3 -m pip install --no-cache-dir -c constraints.txt .
USER trainer
WORKDIR /home/trainer
# the smoke test: two ranks read handwritten digits
CMD ["python3", "-m", "distrain", "+experiment=digits", "launch.ranks=2"]
