# flashar-pl on a CPU, with the versions that the tests last passed with.
#
#   docker build -t flashar-pl .
#   docker run --rm -v "$PWD:/work" flashar-pl demo
#   docker run --rm -v "$PWD:/work" flashar-pl generate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --classes 3,7 --out drawn
#
# /work is the directory that commands read and write. Files belong to the user inside; for your own add --user "$(id -u)".
FROM python:3.11-slim

COPY pyproject.toml constraints.txt README.md LICENSE /opt/flashar-pl/
COPY experiments /opt/flashar-pl/experiments
COPY flashar_pl /opt/flashar-pl/flashar_pl
# torch's own index has wheels without CUDA, which are a tenth of the size
RUN pip install --no-cache-dir --constraint /opt/flashar-pl/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu '/opt/flashar-pl[demo]' \
    && rm -r /opt/flashar-pl

ENV HOME=/tmp OMP_NUM_THREADS=1
# open to every user, for --user without a mount too
RUN useradd --no-create-home flashar && install --directory --owner flashar --mode 1777 /work
USER flashar
WORKDIR /work
ENTRYPOINT ["flashar"]
CMD ["--help"]
