# `moe-llava serve` as a container. How it is built and run: docs/serving.md, "As a container".

FROM python:3.11-slim AS build
# pip reads this from its environment. Given at build time, it may name an index that has a torch for CPUs alone.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /build
RUN python -m venv --without-pip /opt/moe-llava
# torch first and pinned, as in the Makefile: this large layer stays when only the package changes.
COPY constraints.txt ./
RUN pip --python /opt/moe-llava/bin/python install --no-cache-dir --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY moe_llava moe_llava
RUN pip --python /opt/moe-llava/bin/python install --no-cache-dir --constraint constraints.txt '.[serve]'

FROM python:3.11-slim
COPY --from=build /opt/moe-llava /opt/moe-llava
# Nothing is written but below /tmp, and no model is fetched.
ENV PATH=/opt/moe-llava/bin:$PATH HOME=/tmp HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=2m \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["moe-llava", "serve"]
# The server listens to other machines here, so it wants keys: a file that is mounted, one key per line.
CMD ["/model", "--host", "0.0.0.0", "--api-keys", "/run/secrets/api-keys"]
