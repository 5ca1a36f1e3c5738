# docker build --target cpu -t distill:cpu .       about 1 GB
# docker build --target cuda -t distill:cuda .     with the CUDA libraries of the torch wheel
# docker run --rm -v "$PWD:/workspace" distill:cpu train recipe.yaml
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/workspace" distill:cuda train recipe.yaml

FROM python:3.12-slim AS base
RUN useradd --create-home --uid 1000 distill
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/home/distill/.cache/huggingface TORCH_HOME=/home/distill/.cache/torch
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY distill distill
COPY recipes recipes

FROM base AS cpu
RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu \
 && pip install ".[onnx]"
USER distill
WORKDIR /workspace
ENTRYPOINT ["distill"]

FROM base AS cuda
RUN pip install ".[onnx]"
USER distill
WORKDIR /workspace
ENTRYPOINT ["distill"]
