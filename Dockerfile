# The clone with all packages, by the Makefile. Not built yet: what is tested is that the targets are there.
#
#     docker build --tag vca .                   # a CPU: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#     docker run --rm --gpus all --shm-size 8g --volume "$PWD/runs:/vca/runs" vca                     # make demo
#     docker run --rm --gpus all --shm-size 8g --volume "$PWD/runs:/vca/runs" vca python train.py --help

FROM python:3.12
ARG PIP_EXTRA_INDEX_URL
WORKDIR /vca
COPY . .
RUN make install
ENV PATH="/vca/.venv/bin:$PATH"
CMD ["make", "demo"]
