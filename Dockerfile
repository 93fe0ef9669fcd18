# An image for TPU hosts: `docker build -t IMAGE .`, then `python -m launch.gke --image=IMAGE ...`.
FROM python:3.11-slim

WORKDIR /oaif_jax
ENV PYTHONUNBUFFERED=1

# What changes seldom comes first, so that a change of the code doesn't install all again.
COPY setup.py constraints.txt README.md ./
COPY oaif_jax/__init__.py oaif_jax/
RUN pip install --no-cache-dir -c constraints.txt setuptools \
    && pip install --no-cache-dir --no-build-isolation -c constraints.txt . "jax[tpu]"

COPY oaif_jax oaif_jax
COPY experiments experiments
COPY launch launch
RUN pip install --no-cache-dir --no-build-isolation --no-deps -e .

CMD ["python", "-m", "oaif_jax.train", "--help"]
